"""The two passes over a stack: forward on two streams, and the backward pass that restores them in place.

One pair of passes serves all variants: a sublayer replaces one of two streams, reading the other. Each sublayer runs
once forward and once backward. In backward, a tile is recomputed, restored where it stands and back-propagated before
the next is touched; nothing stream-sized is kept that can be read from a stream again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from meftbench.reversible.coupling import Coupling
from meftbench.reversible.fork import Sink, gathered_in
from meftbench.reversible.gradients import Sums
from meftbench.reversible.placed import Handover, Kept, PlacedSubLayer, Tile
from meftbench.reversible.recompute import drew, modes_as, replayed_rng, rng_state, unhooked
from meftbench.reversible.saved_state import SavedState
from meftbench.reversible.sublayers import SubLayer

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack


CACHED = 196_608  # elements


def run_forward(
    stack: ReversibleStack, h_BLD: Tensor, saved: SavedState, *, keep: bool
) -> tuple[list[Tensor], Kept | None]:
    """The last two streams [y1, y2] (B, L, D), contiguous; and the sublayer whose graph is kept for the backward pass.

    keep: a backward pass will follow. Halves then run with gradients enabled, though no graph is kept: that decides
    which kernels torch takes, and recomputation must take the same.
    """
    arithmetic = saved.arithmetic
    watch = saved.range.input() if saved.range else None
    streams = [arithmetic.lift(h_BLD, watch), arithmetic.lift(h_BLD)]
    kept = None
    with ExitStack() as entered:
        entered.enter_context(saved.autocast.entered())
        entered.enter_context(torch.set_grad_enabled(keep))
        if keep:
            entered.enter_context(unhooked())
        for index, block in enumerate(stack.blocks):
            if stack.swap and index:
                streams.reverse()
            _observe(saved, "forward", index, streams)
            args, kwargs, roots = saved.context.fresh(index)
            for replaced, (coupling, sublayer) in enumerate(zip(saved.couplings, block.sublayers, strict=True)):  # type: ignore[arg-type]
                if stack.unread(index, replaced):
                    saved.rng.append(None)
                    saved.sides.append(None)
                    continue
                before = rng_state(saved.device)
                wanted = keep and saved.reads_wanted(index, replaced)
                keeps = keep and saved.keeps(index, replaced)
                handover = Handover()
                with gathered_in(handover) if keeps else nullcontext():
                    part = PlacedSubLayer(sublayer, block, streams[1 - replaced], saved, wanted, args, kwargs)
                part.keeps = keeps
                side = _advance(coupling, part, streams[replaced], index, replaced, keep)
                if keeps:
                    del part.other_BLD  # the backward pass has it: where streams are offloaded, not this one
                    kept = Kept(part, roots, handover)
                saved.rng.append(before if drew(before, saved.device) else None)
                saved.sides.append(side)
                del part, side
    return streams, kept


def _advance(
    coupling: Coupling, part: PlacedSubLayer, stream_BLD: Tensor, index: int, replaced: int, keep: bool
) -> Tensor | None:
    """Replace a stream by its sublayer's result, tile by tile; the packed side information of all its tokens."""
    saved, arithmetic = part.saved, coupling.arithmetic
    watch = saved.range.of(index, replaced) if saved.range else None
    x_TD, other_TD = stream_BLD.flatten(0, 1), part.other_BLD.flatten(0, 1)
    sides = None
    width = arithmetic.side_bytes(x_TD.shape[-1], coupling.factor)
    if keep and width:
        sides = torch.empty(x_TD.shape[0], width, dtype=torch.uint8, device=x_TD.device)
    for rows in saved.tiles:
        value_TD = part.tile(rows).value[0].detach()
        for piece, place in _bites(value_TD, rows):
            side = coupling.forward_(x_TD[place], other_TD[place], value_TD[piece], keep=keep, watch=watch)
            if sides is not None:
                assert side is not None
                sides[place] = side
    return sides


def _bites(value_TD: Tensor, rows: slice) -> Iterator[tuple[slice, slice]]:
    """Rows of a tile, and where they stand in the stream, in pieces that a coupling's dozen passes over them keep in
    a CPU's cache. A GPU's are taken whole, by one kernel."""
    count = value_TD.shape[0]
    # A subclass has no memory to be near to (fake tensors).
    size = max(1, CACHED // value_TD.shape[1]) if value_TD.is_cpu and type(value_TD) is Tensor else count
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), slice(rows.start + start, rows.start + stop)


class BackwardPass:
    """One backward pass: two streams that are restored in place, their gradients, and what has been accumulated.

    streams, gradients: [y1, y2] and theirs (None: zero), owned by the backward pass.  After `run`: those of the input.
    """

    def __init__(
        self,
        stack: ReversibleStack,
        saved: SavedState,
        streams: list[Tensor],
        gradients: list[Tensor | None],
        kept: Kept | None = None,
    ) -> None:
        self.stack, self.saved, self.streams, self.gradients, self.kept = stack, saved, streams, gradients, kept
        self.of_context: list[Tensor | None] = [None] * saved.context.roots
        self.of_normed: Tensor | None = None  # gradient (B, L, D) of what a core read through a pre-norm
        self.of_trained = Sums()

    def run(self, sides: list[Tensor | None]) -> None:
        """BackwardPass from the last block to the first. sides: consumed from the end. Raises StreamError."""
        stack, saved = self.stack, self.saved
        if saved.range and stack.range is None:  # a calibrated range was seen to in the forward pass
            saved.range.check(stack.first_layer)  # what left the range cannot be restored
        with modes_as(stack, saved.modes), saved.numerics.entered():
            for index in reversed(range(len(stack.blocks))):
                trained = [parameter for parameter in stack.blocks[index].parameters() if parameter.requires_grad]
                for replaced in (1, 0):
                    side = sides.pop()
                    if not stack.unread(index, replaced):
                        self._reverse_sublayer(index, replaced, side, trained)
                    del side
                _observe(saved, "backward", index, self.streams)
                if stack.swap and index:
                    self.streams.reverse()
                    self.gradients.reverse()
        if saved.fingerprints:
            saved.fingerprints.check(stack.first_layer)

    def _reverse_sublayer(self, index: int, replaced: int, sides: Tensor | None, trained: list[nn.Parameter]) -> None:
        """Recompute a sublayer once: restore the stream it replaced, and back-propagate."""
        sublayer, coupling = self._sublayer(index, replaced), self.saved.couplings[replaced]
        stream_BLD, other_BLD = self.streams[replaced], self.streams[1 - replaced]
        dy_BLD = self.gradients[replaced]
        with self._as_in_forward(index, replaced):
            self.of_normed = None
            sink = partial(self._add_to_gradient, 1 - replaced) if sublayer.before is None else self._add_to_normed
            part, context_roots = self._begun(index, replaced, sink)
            of_outputs: list[Tensor] = []  # gradients of the core's parts (B·L, E / parts)
            if sublayer.tokens is None and dy_BLD is not None:
                of_outputs = [dy_BLD.flatten(0, 1).to(part.outputs[0].dtype)]
            x_TD, other_TD = stream_BLD.flatten(0, 1), other_BLD.flatten(0, 1)
            for rows in self.saved.tiles:
                tile = part.tile(rows)
                value_TD = tile.value[0].detach()
                for piece, place in _bites(value_TD, rows):
                    side = None if sides is None else sides[place]
                    coupling.inverse_(x_TD[place], other_TD[place], value_TD[piece], side)
                del value_TD
                if dy_BLD is not None and sublayer.tokens is not None:
                    of_core = self._back_through(tile, rows, dy_BLD.flatten(0, 1)[rows], 1 - replaced, trained)
                    if of_core is not None:
                        part.gather(of_core, rows, of_outputs)
                    del of_core
                del tile
        if dy_BLD is None:
            return
        part.outputs.clear()  # their graphs hold them as long as they need them
        self._back_through_core(part, of_outputs, sink, context_roots, trained)
        if sublayer.before is not None:
            with self._as_in_forward(index, replaced):
                self._back_through_norm(part, 1 - replaced, trained)
        other_gradient = self._gradient_of(1 - replaced) if coupling.centred else dy_BLD
        coupling.gradient_(dy_BLD, other_gradient)

    def _sublayer(self, index: int, replaced: int) -> SubLayer:
        return cast(SubLayer, self.stack.blocks[index].sublayers[replaced])  # type: ignore[index]

    def _begun(self, index: int, replaced: int, sink: Sink) -> tuple[PlacedSubLayer, dict[int, Tensor]]:
        """A sublayer whose core has run, recomputed or kept from the forward pass; the context's leaves in its
        graph."""
        saved = self.saved
        if self.kept is not None and saved.keeps(index, replaced):
            kept, self.kept = self.kept, None
            kept.handover.sink, kept.sublayer.other_BLD = sink, self.streams[1 - replaced]
            return kept.sublayer, kept.roots
        args, kwargs, roots = saved.context.fresh(index)
        wanted, other_BLD = saved.reads_wanted(index, replaced), self.streams[1 - replaced]
        sublayer, block = self._sublayer(index, replaced), self.stack.blocks[index]
        with gathered_in(sink):
            return PlacedSubLayer(sublayer, block, other_BLD, saved, wanted, args, kwargs), roots

    @contextmanager
    def _as_in_forward(self, index: int, replaced: int) -> Iterator[None]:
        rng = self.saved.rng[2 * index + replaced]
        with (
            torch.enable_grad(),  # also where no gradient is wanted: as in the forward pass
            self.saved.autocast.entered(),
            replayed_rng(rng, self.saved.device),
        ):
            yield

    def _back_through(
        self, tile: Tile, rows: slice, dy_TD: Tensor, other: int, trained: list[nn.Parameter]
    ) -> Tensor | None:
        """Token-wise work of one tile: gradients of what it read and of the trained tensors are added up, that of the
        core's output (T, E) is given back; None where it needs none."""
        if not tile.value.requires_grad:
            return None
        assert tile.read is not None
        core, read = tile.core, tile.read
        leaves = [leaf for leaf in (read, core) if leaf is not None and leaf.requires_grad]
        # An edge instead of the tensor: the value need not live through its own backward pass.
        edge, dtype = get_gradient_edge(tile.value), tile.value.dtype
        tile.value = tile.core = tile.read = None  # type: ignore[assignment]
        found = list(torch.autograd.grad(edge, [*leaves, *trained], dy_TD[None].to(dtype), allow_unused=True))
        of_core = None
        for leaf in leaves:
            gradient = found.pop(0)
            if gradient is None:
                continue
            if leaf is read:
                self._gradient_of(other).flatten(0, 1)[rows].add_(gradient[0])
            else:
                of_core = gradient[0]
        self.of_trained.add(trained, found)
        return of_core

    def _back_through_core(
        self,
        part: PlacedSubLayer,
        of_outputs: list[Tensor],
        sink: Sink,
        context_roots: dict[int, Tensor],
        trained: list[nn.Parameter],
    ) -> None:
        roots: list[Any] = [*([part.entry] if part.entry is not None else []), *context_roots.values(), *trained]
        if not of_outputs or not roots:
            return
        shape = (*self.saved.shape[:-1], -1)
        while part.edges:
            edge, gradient = part.edges.pop(0), of_outputs.pop(0)
            if edge is None:
                continue
            found = list(torch.autograd.grad(edge, roots, gradient.view(shape), allow_unused=True))
            del edge, gradient
            if part.entry is not None:
                of_read_BLD = found.pop(0)
                if of_read_BLD is not None:
                    sink(of_read_BLD)
                del of_read_BLD
            for place in context_roots:
                self.of_context[place] = _sum(self.of_context[place], found.pop(0))
            self.of_trained.add(trained, found)

    def _back_through_norm(self, part: PlacedSubLayer, other: int, trained: list[nn.Parameter]) -> None:
        """From the gradient of what the core read to that of the stream, a tile at a time."""
        dx_BLD, self.of_normed = self.of_normed, None
        if dx_BLD is None:
            return
        assert part.sublayer.before is not None
        for rows in self.saved.tiles:
            read_1TD = part.read_tile(rows).requires_grad_(part.wanted)
            value_1TD = part.sublayer.before(part.block, read_1TD)
            edge, gradient_1TD = get_gradient_edge(value_1TD), dx_BLD.flatten(0, 1)[rows][None].to(value_1TD.dtype)
            del value_1TD
            roots = [*([read_1TD] if part.wanted else []), *trained]
            found = list(torch.autograd.grad(edge, roots, gradient_1TD, allow_unused=True))
            if part.wanted:
                self._gradient_of(other).flatten(0, 1)[rows].add_(found.pop(0)[0])
            self.of_trained.add(trained, found)

    def _gradient_of(self, stream: int) -> Tensor:
        """The gradient of a stream, to be added to in place."""
        gradient = self.gradients[stream]
        if gradient is None:
            gradient = self.gradients[stream] = torch.zeros(
                self.saved.shape, dtype=self.saved.dtype, device=self.saved.device
            )
        return gradient

    def _add_to_gradient(self, stream: int, term_BLD: Tensor) -> None:
        self._gradient_of(stream).add_(term_BLD)

    def _add_to_normed(self, term_BLD: Tensor) -> None:
        # A copy: a term may be a view of what autograd still uses.
        self.of_normed = term_BLD.clone() if self.of_normed is None else self.of_normed.add_(term_BLD)


def _observe(saved: SavedState, direction: str, index: int, streams: list[Tensor]) -> None:
    for observer in saved.observers:
        observer(direction, index, streams)


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if term is None:
        return total
    return term.clone() if total is None else total.add_(term)  # a term may be dy itself, which is overwritten
