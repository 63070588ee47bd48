"""Recomputation repeats the forward: the same random numbers, the same autocast state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def rng_state(device: torch.device) -> Tensor:
    """State of the generator that dropout on `device` draws from (a tensor on the host)."""
    if device.type == "cpu":
        return torch.get_rng_state()
    module: torch.cuda = getattr(torch, device.type)  # type: ignore[valid-type]
    return module.get_rng_state(device)  # type: ignore[attr-defined, no-any-return]


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """The inverse of `rng_state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


@contextmanager
def replayed_rng(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers as from `state`; the global stream is afterwards where it was. None: no randomness is used."""
    if state is None:
        yield
        return
    found = rng_state(device)
    set_rng_state(state, device)
    try:
        yield
    finally:
        set_rng_state(found, device)


@dataclass(frozen=True)
class AutocastState:
    """Autocast as it was in the forward pass; backward runs outside of it and must enter it again."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device_type: str) -> AutocastState:
        enabled = torch.is_autocast_enabled(device_type)
        return AutocastState(device_type, enabled, torch.get_autocast_dtype(device_type))

    def entered(self) -> AbstractContextManager[object]:
        """The state again, without the cache of cast weights: a cast cached under `no_grad` in the forward has
        no history, and recomputation would silently find no gradient for the weight (torch 2.13)."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@contextmanager
def modes_as(module: nn.Module, modes: list[bool]) -> Iterator[None]:
    """All submodules in the training or evaluation mode of `modes` (in the order of `modules()`), for a time."""
    found = [part.training for part in module.modules()]
    _set_modes(module, modes)
    try:
        yield
    finally:
        _set_modes(module, found)


def _set_modes(module: nn.Module, modes: list[bool]) -> None:
    for part, training in zip(module.modules(), modes, strict=True):
        part.training = training
