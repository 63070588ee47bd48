"""A sublayer at its place in a pass: run for its value, with or without the graph that backward goes through.

Shape suffixes as in sublayers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meftbench.reversible.fork import Sink
from meftbench.reversible.rounds import rounds
from meftbench.reversible.saved_state import SavedState
from meftbench.reversible.sublayers import SubLayer, joined
from meftbench.reversible.taps import tapped_in


@dataclass
class Tile:
    """A sublayer's value (1, T, D) for a tile, and what its graph begins at: the core's output (1, T, E) and the stream
    that it read (1, T, D), if any. tapped: what modules in it passed on (T, X), each in the same graph (taps.py)."""

    value: Tensor
    core: Tensor | None
    read: Tensor | None
    tapped: list[Tensor] = field(default_factory=list)


class Handover:
    """A sink for a graph that is built in the forward pass; the backward pass sets where its gradients go."""

    def __init__(self) -> None:
        self.sink: Sink | None = None

    def __call__(self, term_BLD: Tensor) -> None:
        assert self.sink is not None
        self.sink(term_BLD)


@dataclass
class Kept:
    """The sublayer that the backward pass begins with, its graph as forward built it (`ReversibleStack.keep_last`).

    roots: the context's leaves in the graph.  handover: the sink of the graph (fork.py).
    """

    sublayer: PlacedSubLayer
    roots: dict[int, Tensor]
    handover: Handover


class PlacedSubLayer:
    """A sublayer at one place: its core runs on construction, its token-wise work tile by tile.

    other_BLD: the stream that is read.  wanted: whether it needs a gradient.
    entry: where the graphs of the core's parts begin; it stands for what the core read without holding it.
    outputs, edges: of the core's parts; an edge is None where an output needs no gradient.
    keeps: the only tile is kept, with its graph, from the first call of `tile` to the second.
    """

    def __init__(
        self,
        sublayer: SubLayer,
        block: nn.Module,
        other_BLD: Tensor,
        saved: SavedState,
        needs_grad: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.sublayer, self.block, self.other_BLD, self.saved, self.wanted = (
            sublayer,
            block,
            other_BLD,
            saved,
            needs_grad,
        )
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
        read_BLD = self._as_graph_input(self._read_by_core())
        for part in range(parts):
            output_BLE = sublayer.core(block, read_BLD, part, parts, *args, **kwargs)
            self.edges.append(get_gradient_edge(output_BLE) if output_BLE.requires_grad else None)
            self.outputs.append(output_BLE.detach().flatten(0, 1))
            del output_BLE

    def _read_by_core(self) -> Tensor:
        """The stream (B, L, D) in floating point, after the pre-norm if there is one."""
        if self.sublayer.before is None:
            return self.arithmetic.read(self.other_BLD, self.saved.dtype)
        with torch.no_grad():
            if len(self.saved.tiles) == 1:
                return self.sublayer.before(self.block, self.read_tile(self.saved.tiles[0])).view(self.other_BLD.shape)
            dtype = self.sublayer.before(self.block, self.read_tile(slice(0, 0))).dtype
            read_BLD = torch.empty(self.other_BLD.shape, dtype=dtype, device=self.other_BLD.device)
            for rows in rounds(self.saved.tiles):
                read_BLD.flatten(0, 1)[rows] = self.sublayer.before(self.block, self.read_tile(rows))[0]
            return read_BLD

    def _prepared_by_trained(self) -> bool:
        """Whether the pre-norm has trained tensors: its output then needs a gradient even if the stream needs none."""
        return (
            self.sublayer.before is not None
            and self.sublayer.before(self.block, self.read_tile(slice(0, 1))).requires_grad
        )

    def read_tile(self, rows: slice) -> Tensor:
        """The stream that this sublayer reads, in floating point: (1, T, D)."""
        return self.arithmetic.read(self.other_BLD.flatten(0, 1)[rows][None], self.saved.dtype).detach()

    def _as_graph_input(self, read_BLD: Tensor) -> Tensor:
        """What the core reads; `entry` begins its graph if it needs a gradient."""
        if not (torch.is_grad_enabled() and (self.wanted or self._prepared_by_trained())):
            return read_BLD.detach()
        token = read_BLD.new_empty(0).requires_grad_()
        read_BLD = _Entry.apply(token, read_BLD)  # type: ignore[no-untyped-call]
        self.entry = get_gradient_edge(read_BLD)
        return read_BLD

    def tile(self, rows: slice) -> Tile:
        """The sublayer's value for the tokens `rows`. Tiles draw random numbers, so they must be taken in order."""
        tile, self._kept = self._kept or self._run_tile(rows), None
        if self.keeps:
            self.keeps, self._kept = False, tile
        return tile

    def _run_tile(self, rows: slice) -> Tile:
        core_1TE = joined(self.outputs, rows)
        if self.sublayer.tokens is None:
            assert core_1TE is not None
            return Tile(core_1TE, None, None)
        grad_enabled = torch.is_grad_enabled()
        if core_1TE is not None:
            core_1TE = core_1TE.detach().requires_grad_(grad_enabled and any(edge is not None for edge in self.edges))
        read_1TD = self.read_tile(rows).requires_grad_(grad_enabled and self.wanted)
        tapped: list[Tensor] = []
        with tapped_in(tapped if self.saved.taps else None):
            value_1TD = self.sublayer.tokens(self.block, core_1TE, read_1TD)
        return Tile(value_1TD, core_1TE, read_1TD, tapped)

    def gather(self, core_gradient_TE: Tensor, rows: slice, output_gradients: list[Tensor]) -> None:
        """Write the gradient of the core's output for one tile into `output_gradients`, those of whole parts."""
        pieces = core_gradient_TE.tensor_split(len(self.outputs), -1)
        if len(self.saved.tiles) == 1:
            output_gradients.extend(pieces)
            return
        if not output_gradients:
            output_gradients.extend(torch.empty_like(output) for output in self.outputs)
        for output_gradient, piece in zip(output_gradients, pieces, strict=True):
            output_gradient[rows] = piece


class _Entry(torch.autograd.Function):
    """Where the graph of a sublayer's core begins. The graph would hold a leaf tensor; this node holds none."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, read_BLD: Tensor) -> Tensor:
        return read_BLD.detach()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("gradients are taken at this node, never through it")
