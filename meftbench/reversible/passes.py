"""The two passes over a stack: the forward pass on two streams, and the backward pass, which restores them in place.

The same two passes serve all variants: a sublayer replaces one of two streams, reading the other. Each sublayer runs
once in each pass. In the backward pass, a tile is recomputed, restored in place and back-propagated before the next
is touched; nothing of a stream's size is kept that can be read from a stream again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from meftbench.reversible.fork import Sink, gathered_in
from meftbench.reversible.gradients import Sums, edges_of
from meftbench.reversible.placed import Handover, Kept, PlacedSubLayer, Tile
from meftbench.reversible.recompute import drew, modes_as, replayed_rng, rng_state, unhooked
from meftbench.reversible.rounds import rounds
from meftbench.reversible.saved_state import SavedState
from meftbench.reversible.sublayers import SubLayer
from meftbench.reversible.taps import joined_rows

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack


CACHED = 196_608  # elements of a stream that stay in a CPU's cache while a coupling works on them


def run_forward(
    stack: ReversibleStack, h_BLD: Tensor, saved: SavedState, *, keep: bool
) -> tuple[list[Tensor], Kept | None]:
    """The last two streams [y1, y2] (B, L, D), contiguous; and the sublayer whose graph is kept for the backward pass.

    keep: a backward pass will follow. Sublayers then run with gradients enabled, though only that graph is kept: this
    decides which kernels torch takes, and recomputation must take the same.
    """
    arithmetic = saved.arithmetic
    watch = saved.range.input() if saved.range else None
    streams = [arithmetic.lift(h_BLD, watch), arithmetic.lift(h_BLD)]
    kept = None
    with ExitStack() as contexts:
        contexts.enter_context(saved.autocast.entered())
        contexts.enter_context(torch.set_grad_enabled(keep))
        if keep:
            contexts.enter_context(unhooked())
        for index, block in enumerate(stack.blocks):
            if stack.swap and index:
                streams.reverse()
            _observe(saved, "forward", index, streams)
            if stack.entered:
                stack.entered(index)
            args, kwargs, roots = saved.context.fresh(index)
            for replaced, sublayer in enumerate(block.sublayers):  # type: ignore[arg-type]
                if stack.unread(index, replaced):
                    saved.rng.append(None)
                    saved.sides.append(None)
                    saved.tapped.append([])
                    continue
                rng_before = rng_state(saved.device)
                needs_grad = keep and saved.reads_wanted(index, replaced)
                keeps_graph = keep and saved.keeps(index, replaced)
                handover = Handover()
                with gathered_in(handover) if keeps_graph else nullcontext():
                    placed = PlacedSubLayer(sublayer, block, streams[1 - replaced], saved, needs_grad, args, kwargs)
                placed.keeps = keeps_graph
                side = _replace_stream(placed, streams[replaced], index, replaced, keep)
                if keeps_graph:
                    del placed.other_BLD  # set again by the backward pass; not this tensor if streams are offloaded
                    kept = Kept(placed, roots, handover)
                saved.rng.append(rng_before if drew(rng_before, saved.device) else None)
                memory = stack.side_memory
                saved.sides.append(side if side is None or memory is None else memory.side(side))
                del placed, side
    return streams, kept


def _replace_stream(placed: PlacedSubLayer, stream_BLD: Tensor, index: int, replaced: int, keep: bool) -> Tensor | None:
    """Replace a stream by a coupling, tile by tile. Returns the packed side information of all its tokens, if any."""
    saved, tapped = placed.saved, []
    coupling, signs_T1 = saved.coupling(index, replaced), saved.signs_of(index, replaced)
    watch = saved.range.of(index, replaced) if saved.range else None
    x_TD, other_TD = stream_BLD.flatten(0, 1), placed.other_BLD.flatten(0, 1)
    sides = None
    width = coupling.side_bytes(x_TD.shape[-1])
    if keep and width:
        sides = torch.empty(x_TD.shape[0], width, dtype=torch.uint8, device=x_TD.device)
    for rows in saved.tiles if saved.taps else rounds(saved.tiles):
        tile = placed.tile(rows)
        value_TD = tile.value[0].detach()
        tapped.append([tensor.detach() for tensor in tile.tapped])
        del tile
        for tile_rows, stream_rows in _cache_sized_pieces(value_TD, rows):
            signs = None if signs_T1 is None else signs_T1[stream_rows]
            side = coupling.forward_(
                x_TD[stream_rows], other_TD[stream_rows], value_TD[tile_rows], signs, keep=keep, watch=watch
            )
            if sides is not None:
                assert side is not None
                sides[stream_rows] = side
    saved.tapped.append(joined_rows(tapped))
    return sides


def _cache_sized_pieces(value_TD: Tensor, rows: slice) -> Iterator[tuple[slice, slice]]:
    """Pieces of a tile, as rows of the tile and rows of the stream. A coupling passes over a piece a dozen times, so
    on a CPU a piece is small enough for the cache. On a GPU it is the whole tile, which one kernel can take."""
    count = value_TD.shape[0]
    # A subclass of Tensor (fake tensors) has no memory, so that a cache is of no use to it.
    size = max(1, CACHED // value_TD.shape[1]) if value_TD.is_cpu and type(value_TD) is Tensor else count
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), slice(rows.start + start, rows.start + stop)


class BackwardPass:
    """One backward pass: two streams that are restored in place, and the gradients that it computes.

    streams, gradients: [y1, y2] and their gradients (None: zero), overwritten by `run`, after which they are those of
        the stack's input.
    of_tapped: for each sublayer, gradients of what it passed on (taps.py).
    of_context, of_trained: gradients of the context's differentiable tensors and of the trained parameters.
    """

    def __init__(
        self,
        stack: ReversibleStack,
        saved: SavedState,
        streams: list[Tensor],
        gradients: list[Tensor | None],
        of_tapped: list[list[Tensor]],
        kept: Kept | None = None,
    ) -> None:
        self.stack, self.saved, self.streams, self.gradients, self.kept = stack, saved, streams, gradients, kept
        self.of_tapped = of_tapped
        self.of_context: list[Tensor | None] = [None] * saved.context.roots
        self.of_normed: Tensor | None = None  # gradient (B, L, D) of what a core read through a pre-norm
        self.of_trained = Sums()

    def run(self, sides: list[Any]) -> None:
        """Take the blocks from the last to the first. sides: one per sublayer, in the order of forward; emptied. Those
        that are no tensors were given by the stack's side memory.

        Raises StreamError: a stream left its range; or, in strict mode, inputs were not restored.
        """
        stack, saved = self.stack, self.saved
        if saved.range and stack.range is None:  # the forward pass deals with a calibrated range
            saved.range.check(stack.first_layer)  # what left the range cannot be restored
        with modes_as(stack, saved.modes), saved.numerics.entered():
            for index in reversed(range(len(stack.blocks))):
                if stack.entered:
                    stack.entered(index)
                trained = [parameter for parameter in stack.blocks[index].parameters() if parameter.requires_grad]
                for replaced in reversed(range(len(saved.couplings))):
                    side = sides.pop()
                    if side is not None and not isinstance(side, Tensor):
                        assert stack.side_memory is not None
                        side = stack.side_memory.given_back(side)
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
        """Recompute a sublayer once, restore the stream that it replaced, and back-propagate."""
        sublayer, coupling = self._sublayer(index, replaced), self.saved.coupling(index, replaced)
        signs_T1 = self.saved.signs_of(index, replaced)
        stream_BLD, other_BLD = self.streams[replaced], self.streams[1 - replaced]
        of_tapped = self.of_tapped[len(self.saved.couplings) * index + replaced]
        dy_BLD = self._gradient_of(replaced) if of_tapped else self.gradients[replaced]
        with self._as_in_forward(index, replaced):
            self.of_normed = None
            sink = partial(self._add_to_gradient, 1 - replaced) if sublayer.before is None else self._add_to_normed
            placed, context_roots = self._placed_sublayer(index, replaced, sink)
            output_gradients: list[Tensor] = []  # of the core's parts, each (B·L, E / parts)
            if sublayer.tokens is None and dy_BLD is not None:
                value_gradient_TD = coupling.value_gradient(dy_BLD.flatten(0, 1), signs_T1)
                output_gradients = [value_gradient_TD.to(placed.outputs[0].dtype)]
                del value_gradient_TD
            x_TD, other_TD = stream_BLD.flatten(0, 1), other_BLD.flatten(0, 1)
            for rows in rounds(self.saved.tiles):
                tile = placed.tile(rows)
                value_TD = tile.value[0].detach()
                for tile_rows, stream_rows in _cache_sized_pieces(value_TD, rows):
                    side = None if sides is None else sides[stream_rows]
                    signs = None if signs_T1 is None else signs_T1[stream_rows]
                    coupling.inverse_(x_TD[stream_rows], other_TD[stream_rows], value_TD[tile_rows], side, signs)
                del value_TD
                if dy_BLD is not None and sublayer.tokens is not None:
                    signs = None if signs_T1 is None else signs_T1[rows]
                    value_gradient_TD = coupling.value_gradient(dy_BLD.flatten(0, 1)[rows], signs)
                    core_gradient = self._back_through(tile, rows, value_gradient_TD, of_tapped, 1 - replaced, trained)
                    del value_gradient_TD
                    if core_gradient is not None:
                        placed.gather(core_gradient, rows, output_gradients)
                    del core_gradient
                del tile
        if dy_BLD is None:
            return
        placed.outputs.clear()  # the graphs hold them as long as they need them
        self._back_through_core(placed, output_gradients, sink, context_roots, trained)
        if sublayer.before is not None:
            with self._as_in_forward(index, replaced):
                self._back_through_norm(placed, 1 - replaced, trained)
        other_gradient = self._gradient_of(1 - replaced) if coupling.centre else dy_BLD
        coupling.gradient_(dy_BLD.flatten(0, 1), other_gradient.flatten(0, 1), signs_T1)

    def _sublayer(self, index: int, replaced: int) -> SubLayer:
        return cast(SubLayer, self.stack.blocks[index].sublayers[replaced])  # type: ignore[index]

    def _placed_sublayer(self, index: int, replaced: int, sink: Sink) -> tuple[PlacedSubLayer, dict[int, Tensor]]:
        """A sublayer whose core has run, recomputed or kept from the forward pass; and the leaves of its graph that
        stand for the context's differentiable tensors. sink: receives gradients of what the core read."""
        saved = self.saved
        if self.kept is not None and saved.keeps(index, replaced):
            kept, self.kept = self.kept, None
            kept.handover.sink, kept.sublayer.other_BLD = sink, self.streams[1 - replaced]
            return kept.sublayer, kept.roots
        args, kwargs, roots = saved.context.fresh(index)
        needs_grad, other_BLD = saved.reads_wanted(index, replaced), self.streams[1 - replaced]
        sublayer, block = self._sublayer(index, replaced), self.stack.blocks[index]
        with gathered_in(sink):
            return PlacedSubLayer(sublayer, block, other_BLD, saved, needs_grad, args, kwargs), roots

    @contextmanager
    def _as_in_forward(self, index: int, replaced: int) -> Iterator[None]:
        """Autocast, random numbers and gradient mode as when this sublayer ran in the forward pass."""
        rng = self.saved.rng[len(self.saved.couplings) * index + replaced]
        with (
            torch.enable_grad(),  # as in the forward pass, even where no gradient is needed
            self.saved.autocast.entered(),
            replayed_rng(rng, self.saved.device),
        ):
            yield

    def _back_through(
        self,
        tile: Tile,
        rows: slice,
        dy_TD: Tensor,
        of_tapped: list[Tensor],
        read_stream: int,
        trained: list[nn.Parameter],
    ) -> Tensor | None:
        """Back-propagate through the token-wise work of one tile. Gradients of what it read and of the trained tensors
        are added up; that of the core's output (T, E) is returned, or None where it needs none."""
        if not tile.value.requires_grad:
            return None
        assert tile.read is not None
        core, read = tile.core, tile.read
        leaves = [leaf for leaf in (read, core) if leaf is not None and leaf.requires_grad]
        edges, output_gradients = edges_of(tile.value, dy_TD[None], tile.tapped, of_tapped, rows)
        tile.value = tile.core = tile.read = None  # type: ignore[assignment]
        tile.tapped.clear()
        gradients = list(torch.autograd.grad(edges, [*leaves, *trained], output_gradients, allow_unused=True))
        del edges, output_gradients
        core_gradient = None
        for leaf in leaves:
            gradient = gradients.pop(0)
            if gradient is None:
                continue
            if leaf is read:
                self._gradient_of(read_stream).flatten(0, 1)[rows].add_(gradient[0])
            else:
                core_gradient = gradient[0]
        self.of_trained.add(trained, gradients)
        return core_gradient

    def _back_through_core(
        self,
        placed: PlacedSubLayer,
        output_gradients: list[Tensor],
        sink: Sink,
        context_roots: dict[int, Tensor],
        trained: list[nn.Parameter],
    ) -> None:
        roots: list[Any] = [*([placed.entry] if placed.entry is not None else []), *context_roots.values(), *trained]
        if not output_gradients or not roots:
            return
        shape = (*self.saved.shape[:-1], -1)
        while placed.edges:
            edge, gradient = placed.edges.pop(0), output_gradients.pop(0)
            if edge is None:
                continue
            gradients = list(torch.autograd.grad(edge, roots, gradient.view(shape), allow_unused=True))
            del edge, gradient
            if placed.entry is not None:
                read_gradient_BLD = gradients.pop(0)
                if read_gradient_BLD is not None:
                    sink(read_gradient_BLD)
                del read_gradient_BLD
            for place in context_roots:
                self.of_context[place] = _sum(self.of_context[place], gradients.pop(0))
            self.of_trained.add(trained, gradients)

    def _back_through_norm(self, placed: PlacedSubLayer, read_stream: int, trained: list[nn.Parameter]) -> None:
        """Back-propagate through the pre-norm, a tile at a time: from what the core read to the stream."""
        dx_BLD, self.of_normed = self.of_normed, None
        if dx_BLD is None:
            return
        assert placed.sublayer.before is not None
        for rows in rounds(self.saved.tiles):
            read_1TD = placed.read_tile(rows).requires_grad_(placed.wanted)
            value_1TD = placed.sublayer.before(placed.block, read_1TD)
            edge, gradient_1TD = get_gradient_edge(value_1TD), dx_BLD.flatten(0, 1)[rows][None].to(value_1TD.dtype)
            del value_1TD
            roots = [*([read_1TD] if placed.wanted else []), *trained]
            gradients = list(torch.autograd.grad(edge, roots, gradient_1TD, allow_unused=True))
            if placed.wanted:
                self._gradient_of(read_stream).flatten(0, 1)[rows].add_(gradients.pop(0)[0])
            self.of_trained.add(trained, gradients)

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
        # A copy: a term may be a view of a tensor that autograd still uses.
        self.of_normed = term_BLD.clone() if self.of_normed is None else self.of_normed.add_(term_BLD)


def _observe(saved: SavedState, direction: str, index: int, streams: list[Tensor]) -> None:
    for observer in saved.observers:
        observer(direction, index, streams)


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if term is None:
        return total
    return term.clone() if total is None else total.add_(term)  # a copy: it may be dy itself, which is overwritten
