"""What levers do with the tensors that autograd saves for the backward pass.

Of two contexts with hooks on saved tensors torch calls the inner one's alone. So all levers that hold saved tensors
elsewhere share one context, in which they are asked one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Held = Callable[[], Tensor]  # gives a saved tensor back, on its device; called each time that it is needed


class Keeper(Protocol):
    """A lever's object that holds saved tensors elsewhere."""

    def begin(self) -> bool:
        """A forward pass begins. Returns whether saved tensors are held."""
        ...

    def hold(self, tensor: Tensor) -> Held | None:
        """Hold a tensor that autograd saves; None: it is left to others."""
        ...


class SavedTensors:
    """The keepers of a model in the order in which they are asked. The first that holds a tensor has it."""

    def __init__(self) -> None:
        self.keepers: list[Keeper] = []

    def __call__(self) -> AbstractContextManager[object]:
        """Entered around forward and loss of a step."""
        asked = [keeper for keeper in self.keepers if keeper.begin()]
        if not asked:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(partial(_packed, asked), given_back)


def _packed(keepers: list[Keeper], tensor: Tensor) -> Held | Tensor:
    for keeper in keepers:
        held = keeper.hold(tensor)
        if held is not None:
            return held
    # Without its history: a node that holds its own output with it would be a reference cycle, freed only by gc.
    return tensor.detach()


def given_back(packed: Held | Tensor) -> Tensor:
    """The tensor of what a keeper holds, or the tensor itself where none does."""
    return packed if isinstance(packed, Tensor) else packed()
