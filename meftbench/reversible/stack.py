"""ReversibleStack: the nn.Module that stands in for a list of layers (DESIGN 3.1, 3.5).

Shape suffixes: B samples, L positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meftbench.reversible.arithmetic import Arithmetic
from meftbench.reversible.coupling import Coupling
from meftbench.reversible.function import Context, Finish, Passage, Reversal

Half = Callable[..., Tensor]  # (block, h_BLD, *args, **kwargs) -> (B, L, D)
Observer = Callable[[str, int, list[Tensor]], None]


class Block(nn.Module):
    """One reversible block: the modules it owns, and its two functions F and G.

    parts: submodules by name; each is registered once, here.
    f, g: called as f(block, h_BLD, *args, **kwargs) with what the model passes its layers beside h; plain
        functions that find their modules through `block`, so that a copied block uses its own.
    """

    def __init__(self, parts: Mapping[str, nn.Module], f: Half, g: Half) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.halves = (f, g)


class ReversibleStack(nn.Module):
    """Blocks on two streams, both starting as the input h:

        y1 = first(x1, x2, F(x2))        y2 = second(x2, y1, G(y1))        (x1, x2) <- (y2, y1) if `swap`

    where `first` and `second` are couplings (coupling.py). The result is the mean of the last two streams, or the
    one that `carrier` names. Called as a layer is: stack(h_BLD, *args, **kwargs) -> (B, L, D), in h's dtype.

    carrier: 0 or 1: which stream carries the output of the last pre-trained layer; returned if output is "last".
    activations: what backward uses.
        "reverse": each block's inputs are recomputed from its outputs; only the last two streams, what the
            arithmetic puts aside, and RNG states are kept.
        "cache": ordinary autograd through the same equations.
        "checkpoint": the same, each block under non-reentrant checkpointing.
    observer: called with ("forward", n, [x1, x2]) before block n and ("backward", n, [x1, x2]) once its inputs
        are restored; for probes.

    In evaluation and under `no_grad` the same equations run and nothing is kept. A second backward through one
    forward raises torch's error unless the first was called with retain_graph.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        first: Coupling,
        second: Coupling,
        *,
        swap: bool,
        carrier: int,
        output: Literal["mean", "last"] = "mean",
    ) -> None:
        super().__init__()
        if first.arithmetic is not second.arithmetic:
            raise ValueError("both couplings of a stack must share one arithmetic")
        self.blocks = nn.ModuleList(blocks)
        self.couplings = (first, second)
        self.swap, self.carrier, self.output = swap, carrier, output
        self.activations: Literal["reverse", "cache", "checkpoint"] = "reverse"
        self.observer: Observer | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        return self.couplings[0].arithmetic

    def forward(self, h_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.activations != "reverse":
            return self.finish(self._ordinary(h_BLD, args, kwargs))
        context = Context.of(args, kwargs)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        inputs = [h_BLD, *context.differentiable, *trained]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            return self.finish(self._ordinary(h_BLD, args, kwargs))
        passage = Passage(self, context)
        token = Reversal.apply(passage, len(trained), *inputs)  # type: ignore[no-untyped-call]
        output_BLD: Tensor = Finish.apply(passage, token)  # type: ignore[no-untyped-call]
        return output_BLD

    def finish(self, streams: list[Tensor]) -> Tensor:
        """The hidden state (B, L, D) from the last two streams [y1, y2]."""
        if self.output == "last":
            return self.arithmetic.read(streams[self.carrier])
        return (self.arithmetic.read(streams[0]) + self.arithmetic.read(streams[1])) / 2

    def gradients_of_streams(self, dh_BLD: Tensor) -> list[Tensor | None]:
        """Gradients of [y1, y2] from that of `finish`; None: zero."""
        if self.output == "mean":
            half = dh_BLD / 2
            return [half, half]
        gradients: list[Tensor | None] = [None, None]
        gradients[self.carrier] = dh_BLD
        return gradients

    def _ordinary(self, h_BLD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        streams = [self.arithmetic.lift(h_BLD)] * 2
        for index in range(len(self.blocks)):
            if self.swap and index:
                streams.reverse()
            if self.observer:
                self.observer("forward", index, streams)
            if self.activations == "checkpoint" and torch.is_grad_enabled():
                streams = checkpoint(self._block, index, streams[0], streams[1], args, kwargs, use_reentrant=False)
            else:
                streams = self._block(index, streams[0], streams[1], args, kwargs)
        return streams

    def _block(
        self, index: int, x1_BLD: Tensor, x2_BLD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        block = self.blocks[index]
        f, g = block.halves  # type: ignore[misc]
        first, second = self.couplings
        read = self.arithmetic.read
        y1_BLD, _ = first.forward(x1_BLD, x2_BLD, f(block, read(x2_BLD), *args, **kwargs))
        y2_BLD, _ = second.forward(x2_BLD, y1_BLD, g(block, read(y1_BLD), *args, **kwargs))
        return [y1_BLD, y2_BLD]
