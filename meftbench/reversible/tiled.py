"""Token-wise work of an ordinary layer in tiles, recomputed in backward: the memory optimisation (lever) `+tiled_mlp`.

Only the input is kept; in backward one tile at a time is run again and back-propagated, so that the wide tensors of a
feed-forward exist for one tile at a time. Under checkpointing the work therefore runs once more than without it.
Source: ALST (Bekman et al. 2025), TiledMLP; here with random numbers and autocast repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meftbench.reversible.gradients import Sums, edges_of
from meftbench.reversible.recompute import AutocastState, Numerics, drew, rng_state, run_again
from meftbench.reversible.rounds import rounds
from meftbench.reversible.sublayers import on_tiles, tiles_of
from meftbench.reversible.taps import asked, pass_on, tapped_in

Function = Callable[[Tensor], Tensor]  # (1, T, D) -> (1, T, D), each token alone

# The lever's default is to save memory: as many tiles as exact reversal is compared with (reports/exact-memory). "auto"
# takes only as many as leave each tile large enough to keep the device busy.
LEVER_TILES = 16


@dataclass
class Tiling:
    """tiles: as in `tiles_of`.  recompute: False: autograd keeps activations as usual, of the same tiles.
    ran, recomputed: the number of tiles that were run in forward, and again in backward."""

    tiles: int | Literal["auto"] = LEVER_TILES
    recompute: bool = True
    ran: int = 0
    recomputed: int = 0

    def run(self, function: Function, h_BLD: Tensor, trained: list[Tensor]) -> Tensor:
        """`function` applied to tiles of the tokens of h (B, L, D). trained: tensors in it that need a gradient."""
        tiles = tiles_of(h_BLD.shape[:-1].numel(), self.tiles, h_BLD.shape[-1], h_BLD.device)
        self.ran += len(tiles)
        if not self.recompute:
            return _on_tiles(function, h_BLD, tiles)
        outputs = _Tiled.apply(self, function, tiles, h_BLD, *trained)  # type: ignore[no-untyped-call]
        pass_on(outputs[1:])
        result_BLD: Tensor = outputs[0]
        return result_BLD


def _on_tiles(function: Function, h_BLD: Tensor, tiles: list[slice]) -> Tensor:
    h_TD = h_BLD.flatten(0, 1)
    return torch.cat(on_tiles(lambda rows: function(h_TD[rows][None]), tiles), 1).view(h_BLD.shape)


class _Tiled(torch.autograd.Function):
    """From h and the trained tensors to the value (B, L, D), and what is tapped in it (N, X), where it is asked for."""

    @staticmethod
    def forward(
        ctx: Any, tiling: Tiling, function: Function, tiles: list[slice], h_BLD: Tensor, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.tiling, ctx.function, ctx.tiles, ctx.trained = tiling, function, tiles, trained
        ctx.save_for_backward(h_BLD)
        ctx.autocast, ctx.numerics = AutocastState.now(h_BLD.device.type), Numerics.now()
        rng_before = rng_state(h_BLD.device)
        tapped: list[Tensor] = []
        ctx.taps = asked()
        with ctx.autocast.entered(), tapped_in(tapped if ctx.taps else None):
            result_BLD = _on_tiles(function, h_BLD, tiles)
        ctx.rng = rng_before if drew(rng_before, h_BLD.device) else None
        return result_BLD, *tapped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor, *of_tapped: Tensor) -> tuple[Tensor | None, ...]:
        (h_BLD,) = ctx.saved_tensors
        needs_grad, sums = ctx.needs_input_grad[3], Sums()
        h_TD, dy_TD = h_BLD.flatten(0, 1), dy_BLD.flatten(0, 1)
        dh_BLD = torch.empty_like(h_BLD, memory_format=torch.contiguous_format) if needs_grad else None
        with run_again(ctx.autocast, ctx.numerics, ctx.rng, h_BLD.device):
            for rows in rounds(ctx.tiles):
                leaf = h_TD[rows][None].detach().requires_grad_(needs_grad)
                tapped: list[Tensor] = []
                with tapped_in(tapped if ctx.taps else None):
                    value = ctx.function(leaf)
                edges, output_gradients = edges_of(value, dy_TD[rows][None], tapped, of_tapped, rows)
                del value, tapped
                roots = [*([leaf] if needs_grad else []), *ctx.trained]
                gradients = list(torch.autograd.grad(edges, roots, output_gradients, allow_unused=True))
                del edges, output_gradients
                if dh_BLD is not None:
                    dh_BLD.flatten(0, 1)[rows] = gradients.pop(0)[0]
                sums.add(ctx.trained, gradients)
                ctx.tiling.recomputed += 1
        return (None, None, None, dh_BLD, *sums.of(ctx.trained))
