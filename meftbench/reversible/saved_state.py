"""What a forward pass is called with, and what it saves for the backward pass beside the streams themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meftbench.reversible.arithmetic import Arithmetic
from meftbench.reversible.coupling import Coupling
from meftbench.reversible.recompute import AutocastState, Numerics
from meftbench.reversible.sublayers import tiles_of
from meftbench.reversible.taps import asked
from meftbench.reversible.watch import Fingerprints, Range, sampled

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack

Observer = Callable[[str, int, list[Tensor]], None]


class SideMemory(Protocol):
    """Where the side information of sublayers waits for the backward pass, other than on the device."""

    def side(self, tensor: Tensor) -> Any:
        """Hold side information. Returns an object that is kept in its place for as long as it is needed."""
        ...

    def given_back(self, held: Any) -> Tensor:
        """The side information of such an object, on the device."""
        ...


@dataclass
class Context:
    """What layers are called with beside the hidden state: masks, positions, another stack's output.

    calls: one for all blocks, or one per block.
    differentiable: the tensors in the calls that need a gradient, which is summed over the stack.
    """

    calls: list[_Call]
    differentiable: list[Tensor]
    roots: int  # number of tensors that need a gradient

    @staticmethod
    def of(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Context:
        detached_calls: list[_Call] = []
        differentiable: list[Tensor] = []
        for call in calls:
            # Only plain containers are flattened: a key-value cache is filled in place and must stay the same object.
            leaves, spec = pytree.tree_flatten(call, is_leaf=lambda node: not isinstance(node, tuple | list | dict))
            places = {}
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    places[i] = len(differentiable)
                    differentiable.append(leaf)
            detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            detached_calls.append(_Call(detached, spec, places))
        return Context(detached_calls, differentiable if torch.is_grad_enabled() else [], len(differentiable))

    @property
    def filled(self) -> bool:
        """Whether layers are passed a key-value cache: an object with `update`, by which a core adds to it."""
        return any(hasattr(leaf, "update") for call in self.calls for leaf in call.leaves)

    def fresh(self, block: int) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Tensor]]:
        """The arguments of a block (args, kwargs) with new leaves in place of the differentiable tensors; and these
        leaves, by their index in `differentiable`."""
        call = self.calls[block if len(self.calls) > 1 else 0]
        leaves, roots = list(call.leaves), {}
        for i, place in call.places.items():
            leaves[i] = roots[place] = leaves[i].detach().requires_grad_()
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        return args, kwargs, roots


@dataclass
class _Call:
    leaves: list[Any]
    spec: Any
    places: dict[int, int]  # for leaves that need a gradient: index in `leaves` -> index in `differentiable`


@dataclass
class SavedState:
    """The saved state: what a forward pass saves for the backward pass, beside the streams.

    couplings: of this pass, one for each sublayer of a block; those of the stack may have another range by the time of
        the backward pass.  start: that of F in the first block, where it has another.
    signs: (blocks, sublayers, B), int8: by which factors are multiplied whose sign is drawn; None where none is.
    dtype, shape, device: of the hidden state.  input_wanted: whether the stack's input needs a gradient.
    tiles: rows of the B·L tokens.  parts: in which a core runs.  modes: training or evaluation, of each module.
    observers: called before each block in forward, and in the backward pass once its inputs are restored.
    kept_at: block and sublayer whose graph the forward pass keeps (None: all are recomputed).
    rng: for each sublayer, the state before it drew random numbers; None if it drew none.
    sides: for each sublayer, the side information of its coupling (B·L, bytes), uint8, or what the stack's side memory
        gave for it; None if there is none.
    taps: whether somebody asked for what sublayers pass on (taps.py).
    tapped: for each sublayer, what it passed on (B·L, X), detached.
    """

    context: Context
    couplings: tuple[Coupling, ...]
    start: Coupling | None
    signs: Tensor | None
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    input_wanted: bool
    tiles: list[slice]
    parts: int
    autocast: AutocastState
    numerics: Numerics
    modes: list[bool]
    range: Range | None
    fingerprints: Fingerprints | None
    observers: list[Observer]
    taps: bool = False
    kept_at: tuple[int, int] | None = None
    rng: list[Tensor | None] = field(default_factory=list)
    sides: list[Any] = field(default_factory=list)
    tapped: list[list[Tensor]] = field(default_factory=list)

    @staticmethod
    def of(
        stack: ReversibleStack,
        h_BLD: Tensor,
        context: Context,
        couplings: tuple[Coupling, ...],
        observer: Observer | None = None,
        strict: bool = False,
    ) -> SavedState:
        device, blocks = h_BLD.device, len(stack.blocks)
        start = None if stack.start is None else replace(stack.start, arithmetic=couplings[0].arithmetic)
        limits = [each.limit for each in (*couplings, start) if each is not None and each.limit is not None]
        couplings = tuple(coupling.in_mode(stack.training) for coupling in couplings)
        fingerprints = Fingerprints(sampled(blocks)) if strict and blocks else None
        tiles = tiles_of(h_BLD.shape[:-1].numel(), stack.tiles, h_BLD.shape[-1], device)
        return SavedState(
            context=context,
            couplings=couplings,
            start=start,
            signs=drawn_signs(couplings, blocks, h_BLD),
            dtype=h_BLD.dtype,
            shape=h_BLD.shape,
            device=device,
            input_wanted=h_BLD.requires_grad,
            tiles=tiles,
            # In several parts, a core would add to the cache once per part.
            parts=1 if context.filled else stack.parts_of(len(tiles)),
            autocast=AutocastState.now(device.type),
            numerics=Numerics.now(),
            # The mode, and so dropout, may change between forward and backward; recomputation needs that of forward.
            modes=[module.training for module in stack.modules()],
            range=Range(blocks, min(limits), couplings[0].arithmetic.unit(device), device) if limits else None,
            fingerprints=fingerprints,
            observers=[each for each in (observer, fingerprints) if each is not None],
            taps=asked(),
            kept_at=(blocks - 1, stack.carrier) if stack.keeps_graph(len(tiles)) else None,
        )

    @property
    def arithmetic(self) -> Arithmetic:
        return self.couplings[0].arithmetic

    def coupling(self, index: int, replaced: int) -> Coupling:
        """The coupling of sublayer `replaced` of block `index`."""
        return self.start if self.start is not None and (index, replaced) == (0, 0) else self.couplings[replaced]

    def signs_of(self, index: int, replaced: int) -> Tensor | None:
        """The drawn signs (B·L, 1), int8, of that coupling's factor for each token; None where its sign is fixed."""
        if not self.coupling(index, replaced).drawn:
            return None
        assert self.signs is not None
        return self.signs[index, replaced, :, None].expand(self.shape[:-1]).reshape(-1, 1)

    def keeps(self, index: int, replaced: int) -> bool:
        """Whether the graph of sublayer `replaced` of block `index` is kept from forward instead of recomputed."""
        return (index, replaced) == self.kept_at

    def reads_wanted(self, index: int, replaced: int) -> bool:
        """Whether what sublayer `replaced` of block `index` reads needs a gradient. The lowest sublayer reads the
        stack's input, which may need none; what the others read always counts as needing one."""
        return index > 0 or replaced == 1 or self.input_wanted


def drawn_signs(couplings: tuple[Coupling, ...], blocks: int, h_BLD: Tensor) -> Tensor | None:
    """+1 and −1 at random, (blocks, sublayers, B), int8, from the generator that dropout draws from; None, with nothing
    drawn, where no coupling has a sign to draw."""
    if not any(coupling.drawn for coupling in couplings):
        return None
    shape = (blocks, len(couplings), h_BLD.shape[0])
    return torch.randint(0, 2, shape, dtype=torch.int8, device=h_BLD.device).mul_(2).sub_(1)
