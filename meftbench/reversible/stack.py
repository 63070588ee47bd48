"""ReversibleStack: the nn.Module that replaces a list of layers (docs/design.md 1, 5).

Shape suffixes: B samples, L positions, D hidden size.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meftbench.errors import UserError
from meftbench.reversible.arithmetic import Arithmetic, FixedPoint, Float
from meftbench.reversible.calibration import CalibratedRange, Largest, computed
from meftbench.reversible.coupling import Coupling
from meftbench.reversible.function import Finish, Passage, Reversal
from meftbench.reversible.passes import run_forward
from meftbench.reversible.placed import Kept
from meftbench.reversible.recompute import modes_as, replayed_rng, rng_state, set_rng_state
from meftbench.reversible.saved_state import Context, Observer, SavedState, SideMemory, drawn_signs
from meftbench.reversible.sublayers import SubLayer, tiles_of
from meftbench.reversible.taps import pass_on, tapped_in
from meftbench.reversible.watch import Range

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments (args, kwargs) of a layer beside h


class Block(nn.Module):
    """One reversible block: its modules, and its two sublayers F and G.

    parts: submodules by name, registered as attributes of the block.
    f, g: a SubLayer, or a plain function called as f(block, h_BLD, *args, **kwargs) with what the model passes its
        layers beside h; they find their modules through `block`, so that a copied block uses its own.  g: None: the
        block replaces one of the streams only.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        f: Callable[..., Tensor] | SubLayer,
        g: Callable[..., Tensor] | SubLayer | None = None,
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.sublayers = tuple(SubLayer.of(sublayer) for sublayer in (f, g) if sublayer is not None)


class Relay(nn.Module):
    """Replaces one layer of a model whose last layer is replaced by the stack: it returns h unchanged and records for
    the stack what this layer was called with, for models that call layers with different masks or positions."""

    def __init__(self, index: int, stack: ReversibleStack) -> None:
        super().__init__()
        self.index, self._stack = index, [stack]  # in a list: not a submodule

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it changes the stack's list of calls
    def forward(self, h_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (stack,) = self._stack
        if self.index == 0:
            stack.noted = []  # drops the calls of a forward pass that was broken off
        stack.noted.append((args, kwargs))
        return h_BLD


class ReversibleStack(nn.Module):
    """Blocks on two streams, both starting as the input h:

        y1 = first(x1, x2, F(x2))        y2 = second(x2, y1, G(y1))        (x1, x2) <- (y2, y1) if `swap`

    where `first` and `second` are couplings (coupling.py): λ·x1 + F(x2) and β·x2 + G(y1) as published. Where blocks
    have no G, `second` is None and y2 is x2; swapped, the streams are then two consecutive hidden states. The result is
    the mean of the last two streams, or the one that `carrier` names. Called as a layer is: stack(h_BLD, *args,
    **kwargs) -> (B, L, D), floating point, in h's dtype. args and kwargs go to the sublayers' cores; where layers are
    called with different ones, a `Relay` stands in the place of each block but the last.

    The couplings' arithmetic (arithmetic.py) says how streams are represented between blocks: `Float` in h's dtype, as
    published, or `FixedPoint` as integers, whose reversal is exact in every precision that the sublayers compute in.

    start: the coupling of F in the first block, if it is another than `first`; of the same arithmetic.
    calibrated: the fixed-point steps are taken from the model: one per channel, from the values of the first forward
        pass (calibration.py). A later pass that leaves the range is run again with a wider one, from the same random
        numbers; `range.widenings` counts these.
    carrier: 0 or 1: which stream carries the output of the last pre-trained layer; returned if output is "last".
    tiles: token-wise work runs on that many tiles of the B·L tokens, in forward and backward; "auto": see `tiles_of`.
    parts: a sublayer's core runs in that many parts, such as groups of heads; in a single one where there are fewer
        than `parts_from` tiles.
    activations: what backward uses.
        "reverse": each block's inputs are recomputed from its outputs; the last two streams and the saved state
            (side information, RNG states; saved_state.py) are kept.
        "cache": reference autograd: the same equations under torch's autograd, nothing recomputed.
        "checkpoint": as "cache", but each block of `checkpointed` under non-reentrant checkpointing.
    checkpointed: with "checkpoint", the indices of the blocks that run again in backward; None: all.
    checkpoint_options: with "checkpoint", further keyword arguments of torch's checkpoint, such as context_fn.
    strict: with "reverse", verify at the lowest, the middle and the top block that the inputs are restored bit for
        bit; StreamError is raised at the end of backward otherwise. This costs sums over the streams of these blocks.
    keep_last: keep the graph of the sublayer that the backward pass begins with, which forward builds anyway, instead
        of recomputing it, where there is one tile. It is for models in which what comes after the stack holds less
        than a block's graph (no vocabulary-sized logits, no layers) and is done before the backward pass begins: the
        peak is then where the backward pass holds that graph, and keeping it earlier does not raise the peak.
    first_layer: number of the first block in error messages.
    observer: for probes; called with ("forward", n, [x1, x2]) before block n and ("backward", n, [x1, x2]) once its
        inputs are restored, as the arithmetic represents them. The streams are overwritten after the call.
    side_memory: holds the side information of each sublayer as soon as it is made; None: it stays on the device.
    entered: called with n before block n runs, in forward and in the backward pass; it may bring the frozen weights of
        that block to the device, or gather them where they are sharded.
    largest_of_all: of processes that share a training step: gives the elementwise largest of a tensor over them. Their
        calibrated ranges are then the same, and where one of them runs a pass again all do.

    A coupling whose sign is drawn has no inverse in evaluation mode (its factor is 0). A backward pass in that mode is
    run by reference autograd, each block under checkpointing.

    Under `no_grad`, or where nothing needs a gradient, the same equations run and nothing is kept. A second backward
    through one forward raises torch's error unless the first was called with retain_graph.

    Raises StreamError: a value of a fixed-point stream is NaN or infinite; or it left a range that is not calibrated
    (in backward, or under `no_grad` at the end).
    Raises ValueError: couplings, or options, that exclude each other; or a factor that the arithmetic cannot undo.
    Raises UserError: the stack runs under DataParallel, or its parameters are sharded while it runs.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        first: Coupling,
        second: Coupling | None = None,
        *,
        swap: bool,
        carrier: int,
        start: Coupling | None = None,
        output: Literal["mean", "last"] = "mean",
        tiles: int | Literal["auto"] = 1,
        parts: int = 1,
        parts_from: int = 0,
        strict: bool = False,
        first_layer: int = 0,
        calibrated: bool = False,
        keep_last: bool = False,
    ) -> None:
        super().__init__()
        if any(each is not None and each.arithmetic != first.arithmetic for each in (second, start)):
            raise ValueError("all couplings of a stack must share one arithmetic")
        if strict and not first.arithmetic.exact:
            raise ValueError(f"strict verifies exact reversal, which {first.arithmetic.name} arithmetic is not")
        if calibrated and not first.arithmetic.exact:
            raise ValueError(f"calibrated is for fixed-point streams, not for {first.arithmetic.name} ones")
        given = (first,) if second is None else (first, second)
        for coupling in given:
            coupling.side_bytes(8)  # raises ValueError for a factor that the arithmetic cannot undo
        self.blocks = nn.ModuleList(blocks)
        if any(len(block.sublayers) != len(given) for block in self.blocks):  # type: ignore[arg-type]
            raise ValueError("a stack has as many couplings as each of its blocks has sublayers")
        self._couplings, self.start = given, start  # as given; `couplings` has the current steps
        self.range = CalibratedRange() if calibrated else None
        self.swap, self.carrier, self.output = swap, carrier, output
        self.tiles, self.parts, self.parts_from = tiles, parts, parts_from
        self.strict, self.first_layer, self.keep_last = strict, first_layer, keep_last
        self.activations: Literal["reverse", "cache", "checkpoint"] = "reverse"
        self.checkpointed: frozenset[int] | None = None
        self.checkpoint_options: dict[str, Any] = {}
        self.observer: Observer | None = None
        self.side_memory: SideMemory | None = None
        self.entered: Callable[[int], None] | None = None
        self.largest_of_all: Callable[[Tensor], Tensor] | None = None
        self.noted: list[Call] = []

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The couplings of F and G in training, with the current fixed-point steps in their arithmetic."""
        if self.range is None or self.range.steps is None:
            return self._couplings
        return _with_arithmetic(self._couplings, replace(self._fixed, step_bits=self.range.steps))

    @property
    def _fixed(self) -> FixedPoint:
        arithmetic = self._couplings[0].arithmetic
        assert isinstance(arithmetic, FixedPoint)
        return arithmetic

    @property
    def arithmetic(self) -> Arithmetic:
        return self.couplings[0].arithmetic

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled in the forward pass, sublayers would be recomputed by other kernels
    def forward(self, h_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if getattr(self, "_is_replica", False):  # torch's mark on the copies of DataParallel, whose buffers are lost
            raise UserError("ReversibleStack", "is copied by DataParallel", "use DistributedDataParallel")
        sharded = [parameter for parameter in self.parameters() if hasattr(parameter, "device_mesh")]
        if any(parameter.requires_grad or self.entered is None for parameter in sharded):
            cure = "give fully_shard the whole stack or model, not its blocks or layers, or use DistributedDataParallel"
            raise UserError("ReversibleStack", "its parameters are sharded while it runs", cure)
        calls, self.noted = [*self.noted, (args, kwargs)], []
        context = Context.of(calls)
        if self.range is not None and self.range.steps is None:
            self._calibrate(h_BLD, calls)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        inputs = [h_BLD, *context.differentiable, *trained]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            return self._without_backward(h_BLD, context)
        if self.activations != "reverse" or not self._reversible:
            return self._reference(h_BLD, calls)
        passage = Passage(self, context)
        token, *tapped = Reversal.apply(passage, len(trained), *inputs)  # type: ignore[no-untyped-call]
        pass_on(tapped)
        output_BLD: Tensor = Finish.apply(passage, token)  # type: ignore[no-untyped-call]
        return output_BLD

    @property
    def _reversible(self) -> bool:
        """Whether the couplings have inverses in the mode, training or evaluation, that the stack is in."""
        return all(coupling.in_mode(self.training).reversible for coupling in self._couplings)

    def parts_of(self, tiles: int) -> int:
        """The number of parts that a core runs in where there are that many tiles."""
        return self.parts if tiles >= self.parts_from else 1

    def unread(self, index: int, replaced: int) -> bool:
        """Whether nothing reads what sublayer `replaced` of block `index` would write, so that it is not run."""
        return self.output == "last" and index == len(self.blocks) - 1 and replaced > self.carrier

    def keeps_graph(self, tiles: int) -> bool:
        """Whether the forward pass keeps the graph that the backward pass begins with (`keep_last`)."""
        # Floating-point streams are read without a copy, so a graph would hold a stream that is overwritten.
        return self.keep_last and tiles == 1 and self.output == "last" and self.arithmetic.exact

    def finish(self, streams: list[Tensor], dtype: torch.dtype, arithmetic: Arithmetic) -> Tensor:
        """The hidden state (B, L, D) from the last two streams [y1, y2], as a new tensor."""
        read = arithmetic.read
        if self.output == "last":
            carried_BLD = read(streams[self.carrier], dtype)
            # A stream of that dtype is read without a copy, and the backward pass would overwrite the output.
            return carried_BLD.clone() if streams[self.carrier].dtype == dtype else carried_BLD
        return (read(streams[0], dtype) + read(streams[1], dtype)).div_(2)

    def gradients_of_streams(self, dh_BLD: Tensor) -> list[Tensor | None]:
        """Gradients of [y1, y2] from that of the result of `finish`, in new tensors; None: zero."""
        if self.output == "mean":
            half_BLD = (dh_BLD / 2).contiguous()
            return [half_BLD, half_BLD.clone()]
        gradients: list[Tensor | None] = [None, None]
        gradients[self.carrier] = dh_BLD.clone(memory_format=torch.contiguous_format)
        return gradients

    def run(self, h_BLD: Tensor, context: Context, *, keep: bool) -> tuple[list[Tensor], SavedState, Kept | None]:
        """Run forward. Returns the last two streams, the saved state, and the graph that is kept for the backward pass.

        A pass in which a stream leaves a calibrated range is run again with a wider one, until none does.
        keep: a backward pass will follow.
        Raises StreamError: a calibrated range cannot be widened, as values are NaN or infinite.
        """
        couplings = self.couplings
        if self.range is not None and self.range.steps is not None and context.filled:
            # A second run would add to the layers' cache again, so instead of one, streams have 64 bits.
            couplings = _with_arithmetic(couplings, replace(self._fixed, step_bits=self.range.steps, wide=True))
        rng_before = rng_state(h_BLD.device)
        while True:
            saved = SavedState.of(self, h_BLD, context, couplings, self.observer, self.strict and keep)
            streams, kept = run_forward(self, h_BLD, saved, keep=keep)
            if self.range is None or context.filled or saved.range is None or not self._left(saved.range, h_BLD):
                return streams, saved, kept
            del streams, saved, kept
            with replayed_rng(rng_before, h_BLD.device):
                largest_ND = self._largest(h_BLD, context)
            self.range.widen(largest_ND, self._limit(), self.first_layer)
            couplings = self.couplings
            set_rng_state(rng_before, h_BLD.device)

    def _calibrate(self, h_BLD: Tensor, calls: list[Call]) -> None:
        assert self.range is not None
        if not computed(h_BLD):
            return  # a traced step has no values, and a single step for all channels allocates as much
        context = Context.of(calls)
        if context.filled:
            context = Context.of(copy.deepcopy(calls))  # only the caller's pass may fill its cache
        # Without dropout the range depends on the batch alone, not on random numbers.
        with modes_as(self, [False for _ in self.modules()]):
            largest_ND = self._largest(h_BLD, context)
        self.range.calibrate(largest_ND, self._limit(), self.first_layer)

    def _left(self, watched: Range, h_BLD: Tensor) -> bool:
        """Whether a stream left its range, here or in a process that shares the step."""
        left = watched.left()
        if self.largest_of_all is None or not computed(h_BLD):
            return left
        return bool(self.largest_of_all(torch.tensor([float(left)])))

    def _limit(self) -> float:
        couplings: list[Coupling] = [*self._couplings, *([] if self.start is None else [self.start])]
        limits: list[float] = [limit for coupling in couplings if (limit := coupling.limit) is not None]
        return min(limits)

    def _largest(self, h_BLD: Tensor, context: Context) -> Tensor:
        """Largest |value| of each channel before each block and after the last, (blocks + 1, D), computed by the same
        equations in floating point, which has no such range."""
        with torch.no_grad(), tapped_in(None):
            largest = Largest()
            wide_BLD = h_BLD.float() if h_BLD.dtype.itemsize < 4 else h_BLD
            saved = SavedState.of(self, h_BLD, context, _with_arithmetic(self._couplings, Float()), largest)
            largest.add(run_forward(self, wide_BLD, saved, keep=False)[0])
            table_ND = largest.table()
            return table_ND if self.largest_of_all is None else self.largest_of_all(table_ND)

    def _without_backward(self, h_BLD: Tensor, context: Context) -> Tensor:
        """The hidden state after the stack, of a pass that saves nothing."""
        with torch.no_grad():
            streams, saved, _ = self.run(h_BLD, context, keep=False)
            if saved.range:
                saved.range.check(self.first_layer)
            pass_on(list(itertools.chain.from_iterable(saved.tapped)))
            return self.finish(streams, h_BLD.dtype, saved.arithmetic)

    def _reference(self, h_BLD: Tensor, calls: list[Call]) -> Tensor:
        """The hidden state after the stack by reference autograd; unless `activations` is "cache", each block is run
        under checkpointing."""
        operations, dtype = self.arithmetic.reference, h_BLD.dtype
        couplings = tuple(coupling.in_mode(self.training) for coupling in self.couplings)
        signs = drawn_signs(couplings, len(self.blocks), h_BLD)
        streams = [operations.lifted(h_BLD)] * 2
        for index in range(len(self.blocks)):
            if self.swap and index:
                streams.reverse()
            if self.observer:
                self.observer("forward", index, streams)
            of_block = couplings
            if self.start is not None and index == 0:
                of_block = (replace(self.start, arithmetic=self.arithmetic), *couplings[1:])
            signs_SB11 = None if signs is None else signs[index, :, :, None, None]
            call = calls[index if len(calls) > 1 else 0]
            block_args = (index, of_block, signs_SB11, streams[0], streams[1], dtype, *call)
            if self.activations == "cache" or not self._checkpoints(index):
                streams = self._block(*block_args)
            else:
                streams = checkpoint(self._block, *block_args, use_reentrant=False, **self.checkpoint_options)
        if self.output == "last":
            return operations.read(streams[self.carrier], dtype)
        return (operations.read(streams[0], dtype) + operations.read(streams[1], dtype)) / 2

    def _checkpoints(self, index: int) -> bool:
        """Whether a block is one of those that are checkpointed, if not all are."""
        return self.activations != "checkpoint" or self.checkpointed is None or index in self.checkpointed

    def _block(
        self,
        index: int,
        couplings: tuple[Coupling, ...],
        signs_SB11: Tensor | None,
        x1_BLD: Tensor,
        x2_BLD: Tensor,
        dtype: torch.dtype,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Tensor]:
        if self.entered:
            self.entered(index)
        block, streams = self.blocks[index], [x1_BLD, x2_BLD]
        read = self.arithmetic.reference.read
        tiles = tiles_of(x1_BLD.shape[:-1].numel(), self.tiles, x1_BLD.shape[-1], x1_BLD.device)
        parts = self.parts_of(len(tiles))
        for replaced, (coupling, sublayer) in enumerate(zip(couplings, block.sublayers, strict=True)):  # type: ignore[arg-type]
            if self.unread(index, replaced):
                continue
            other_BLD = streams[1 - replaced]
            value_BLD = sublayer.reference(block, read(other_BLD, dtype), tiles, parts, args, kwargs)
            signs = signs_SB11[replaced] if signs_SB11 is not None and coupling.drawn else None
            streams[replaced] = coupling.reference(streams[replaced], other_BLD, value_BLD, signs)
        return streams


def _with_arithmetic(couplings: tuple[Coupling, ...], arithmetic: Arithmetic) -> tuple[Coupling, ...]:
    return tuple(replace(coupling, arithmetic=arithmetic) for coupling in couplings)
