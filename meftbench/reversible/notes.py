"""What a forward pass is given, and what it notes for the walk back, beside the streams themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meftbench.reversible.halves import tiles_of
from meftbench.reversible.recompute import AutocastState, Numerics
from meftbench.reversible.watch import Fingerprints, Range, sampled

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack


@dataclass
class Context:
    """What a layer is called with beside the hidden state: masks, positions, another stack's output.

    differentiable: the tensors among it that need a gradient; it is accumulated over the stack.
    """

    leaves: list[Any]
    spec: Any
    places: list[int]
    differentiable: list[Tensor]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        differentiable = [leaves[i] for i in places]
        detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return Context(detached, spec, places, differentiable if torch.is_grad_enabled() else [])

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """The arguments, with new leaves in place of the differentiable tensors; and those leaves."""
        leaves, roots = list(self.leaves), []
        for place in self.places:
            leaves[place] = leaves[place].detach().requires_grad_()
            roots.append(leaves[place])
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs, roots


@dataclass
class Notes:
    """What a forward pass notes for the walk back.

    dtype, shape, device: of the hidden state.  input_wanted: whether the stack's input needs a gradient.
    rng: a state for each half that drew random numbers.  sides: what each half's coupling put aside (T, bytes).
    """

    context: Context
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
    rng: list[Tensor | None] = field(default_factory=list)
    sides: list[Tensor | None] = field(default_factory=list)

    @staticmethod
    def of(stack: ReversibleStack, h_BLD: Tensor, context: Context, strict: bool) -> Notes:
        device, blocks = h_BLD.device, len(stack.blocks)
        limits = [coupling.limit for coupling in stack.couplings if coupling.limit is not None]
        tiles = tiles_of(h_BLD.shape[:-1].numel(), stack.tiles, h_BLD.shape[-1], device)
        return Notes(
            context=context,
            dtype=h_BLD.dtype,
            shape=h_BLD.shape,
            device=device,
            input_wanted=h_BLD.requires_grad,
            tiles=tiles,
            parts=stack.parts_of(len(tiles)),
            autocast=AutocastState.now(device.type),
            numerics=Numerics.now(),
            # Dropout may be switched between forward and backward; recomputation must see the forward's mode.
            modes=[module.training for module in stack.modules()],
            range=Range(blocks, min(limits), stack.arithmetic.unit, device) if limits else None,
            fingerprints=Fingerprints(sampled(blocks)) if strict and blocks else None,
        )

    def reads_wanted(self, index: int, replaced: int) -> bool:
        """Whether what half `replaced` of block `index` reads needs a gradient; the lowest reads the stack's input."""
        return index > 0 or replaced == 1 or self.input_wanted
