"""A sublayer of a block at its place: run for its value, with or without the graph that backward goes through.

Shape suffixes as in sublayers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meftbench.reversible.fork import Sink
from meftbench.reversible.saved_state import SavedState
from meftbench.reversible.sublayers import SubLayer, joined


@dataclass
class Tile:
    """A sublayer's value (1, T, D) for a tile, and the leaves its graph begins at."""

    value: Tensor
    core: Tensor | None
    read: Tensor | None


class Handover:
    """A sink for gradients of a graph that is built before it is known where they belong: in forward, for the
    backward pass."""

    def __init__(self) -> None:
        self.sink: Sink | None = None

    def __call__(self, term_BLD: Tensor) -> None:
        assert self.sink is not None
        self.sink(term_BLD)


@dataclass
class Kept:
    """The sublayer that the backward pass begins with, its graph as forward built it (`ReversibleStack.keep_last`).

    roots: the context's leaves in the graph.  handover: where its forked modules hand their gradients.
    """

    sublayer: PlacedSubLayer
    roots: dict[int, Tensor]
    handover: Handover


class PlacedSubLayer:
    """A sublayer at one place: its core run at once, its token-wise work tile by tile.

    The cores' graphs end in `entry`, which stands for the stream read in floating point without holding it.
    keeps: the graph of the only tile is kept from the first asking to the second.
    """

    def __init__(
        self,
        sublayer: SubLayer,
        block: nn.Module,
        other_BLD: Tensor,
        saved: SavedState,
        wanted: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.sublayer, self.block, self.other_BLD, self.saved, self.wanted = sublayer, block, other_BLD, saved, wanted
        self.arithmetic = saved.arithmetic
        self.keeps = False
        self._kept: Tile | None = None
        self.entry: GradientEdge | None = None
        self.outputs: list[Tensor] = []  # (B·L, E / parts)
        self.edges: list[GradientEdge | None] = []
        parts = sublayer.parts(saved.parts)
        if not parts:
            return
        assert sublayer.core is not None
        read_BLD = self._entered(self._read_by_core())
        for part in range(parts):
            output_BLE = sublayer.core(block, read_BLD, part, parts, *args, **kwargs)
            self.edges.append(get_gradient_edge(output_BLE) if output_BLE.requires_grad else None)
            self.outputs.append(output_BLE.detach().flatten(0, 1))
            del output_BLE

    def _read_by_core(self) -> Tensor:
        if self.sublayer.before is None:
            return self.arithmetic.read(self.other_BLD, self.saved.dtype)
        with torch.no_grad():
            tiles = [self.sublayer.before(self.block, self.read_tile(rows)) for rows in self.saved.tiles]
            return (tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)).view(self.other_BLD.shape)

    def _prepared_by_trained(self) -> bool:
        """Whether `before` uses a tensor that is trained: it needs a gradient though the stream needs none."""
        return (
            self.sublayer.before is not None
            and self.sublayer.before(self.block, self.read_tile(slice(0, 1))).requires_grad
        )

    def read_tile(self, rows: slice) -> Tensor:
        """The stream that this sublayer reads, in floating point: (1, T, D)."""
        return self.arithmetic.read(self.other_BLD.flatten(0, 1)[rows][None], self.saved.dtype).detach()

    def _entered(self, read_BLD: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and (self.wanted or self._prepared_by_trained())):
            return read_BLD.detach()
        token = read_BLD.new_empty(0).requires_grad_()
        read_BLD = _Entry.apply(token, read_BLD)  # type: ignore[no-untyped-call]
        self.entry = get_gradient_edge(read_BLD)
        return read_BLD

    def tile(self, rows: slice) -> Tile:
        """The sublayer's value for the tokens `rows`; tiles must be asked for in order, for the random numbers."""
        tile, self._kept = self._kept or self._computed(rows), None
        if self.keeps:
            self.keeps, self._kept = False, tile
        return tile

    def _computed(self, rows: slice) -> Tile:
        core_1TE = joined(self.outputs, rows)
        if self.sublayer.tokens is None:
            assert core_1TE is not None
            return Tile(core_1TE, None, None)
        grad = torch.is_grad_enabled()
        if core_1TE is not None:
            core_1TE = core_1TE.detach().requires_grad_(grad and any(edge is not None for edge in self.edges))
        read_1TD = self.read_tile(rows).requires_grad_(grad and self.wanted)
        return Tile(self.sublayer.tokens(self.block, core_1TE, read_1TD), core_1TE, read_1TD)

    def gather(self, of_core_TE: Tensor, rows: slice, of_outputs: list[Tensor]) -> None:
        """Put the gradient of the core's output for one tile where those of whole parts are gathered."""
        pieces = of_core_TE.tensor_split(len(self.outputs), -1)
        if len(self.saved.tiles) == 1:
            of_outputs.extend(pieces)
            return
        if not of_outputs:
            of_outputs.extend(torch.empty_like(output) for output in self.outputs)
        for room, piece in zip(of_outputs, pieces, strict=True):
            room[rows] = piece


class _Entry(torch.autograd.Function):
    """Where the graph of a sublayer's core begins. A leaf would be held by its graph; this node holds nothing."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, read_BLD: Tensor) -> Tensor:
        return read_BLD.detach()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("gradients are taken at this node, never through it")
