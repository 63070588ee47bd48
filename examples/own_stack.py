"""The engine alone: layers of your own made reversible, without transformers and without a benchmark.

    python examples/own_stack.py

Each block owns its modules and has two functions, F and G: y1 = (x1 - x2) / 8 + F(x2), y2 = x2 + G(y1). Its inputs are
computed from its outputs in the backward pass, exactly, so that depth costs a few bits an element and no activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meftbench.reversible import Block, Coupling, FixedPoint, ReversibleStack


def f(block: nn.Module, h_BLD: Tensor) -> Tensor:  # shapes are said by the suffix: batch, length, width
    """A residual feed-forward layer."""
    return h_BLD + block.get_submodule("feed_forward")(block.get_submodule("norm")(h_BLD))


def g(block: nn.Module, h_BLD: Tensor) -> Tensor:
    """A small projection."""
    projected_BLD: Tensor = block.get_submodule("projection")(h_BLD)
    return projected_BLD


def a_stack(layers: int, width: int) -> ReversibleStack:
    """`layers` blocks that check, in every step, that reversal was exact (strict)."""
    blocks = []
    for _ in range(layers):
        feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        parts = {"norm": nn.LayerNorm(width), "feed_forward": feed_forward, "projection": nn.Linear(width, width)}
        blocks.append(Block(parts, f, g))
    exact = FixedPoint()
    centred, plain = Coupling(exact, 1 / 8, centre=1), Coupling(exact, 1.0)
    return ReversibleStack(blocks, centred, plain, swap=True, carrier=0, output="last", calibrated=True, strict=True)


def main() -> None:
    """One backward pass, reversed and by reference autograd."""
    torch.manual_seed(0)
    stack = a_stack(layers=24, width=32)
    h_BLD = torch.randn(2, 16, 32)
    gradients = []
    for stack.activations in ("reverse", "cache"):
        stack.zero_grad()
        stack(h_BLD).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in stack.parameters() if p.grad is not None]))
    reversed_, true = gradients
    print(f"24 layers: gradients differ by {float((reversed_ - true).norm() / true.norm()):.0e} of their norm")


if __name__ == "__main__":
    main()
