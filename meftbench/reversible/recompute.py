"""What makes recomputation repeat the forward pass: the same random numbers, autocast state, kernels and precisions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def rng_state(device: torch.device) -> Tensor:
    """State of the random number generator that dropout on `device` uses (a tensor on the host)."""
    if device.type in ("cpu", "meta"):
        return torch.get_rng_state()
    module: torch.cuda = getattr(torch, device.type)  # type: ignore[valid-type]
    return module.get_rng_state(device)  # type: ignore[attr-defined, no-any-return]


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Set the state that `rng_state` returns."""
    if device.type in ("cpu", "meta"):
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


def drew(before: Tensor, device: torch.device) -> bool:
    """Whether random numbers have been drawn on `device` since its state was `before`."""
    return _content(before) != _content(rng_state(device))


def _content(state: Tensor) -> bytes:
    # Not compared as tensors: that would be an operation to tools that count or fake torch's operations.
    return ctypes.string_at(state.data_ptr(), state.nbytes)


@contextmanager
def replayed_rng(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers begin at `state` inside; the generator's state is restored afterwards. None: none are drawn."""
    if state is None:
        yield
        return
    state_before = rng_state(device)
    set_rng_state(state, device)
    try:
        yield
    finally:
        set_rng_state(state_before, device)


@dataclass(frozen=True)
class AutocastState:
    """Autocast as it was in the forward pass; backward runs outside of its context and must enter it again."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device_type: str) -> AutocastState:
        if device_type == "meta":
            return AutocastState("cpu", False, torch.bfloat16)  # meta tensors have no autocast
        enabled = torch.is_autocast_enabled(device_type)
        return AutocastState(device_type, enabled, torch.get_autocast_dtype(device_type))

    def entered(self) -> AbstractContextManager[object]:
        """A context with this state, without autocast's cache of cast weights: a cast that was cached under `no_grad`
        in the forward pass has no history, so the weight would silently get no gradient (torch 2.13)."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@contextmanager
def modes_as(module: nn.Module, modes: list[bool]) -> Iterator[None]:
    """All submodules in the training or evaluation mode of `modes` (in the order of `modules()`), inside only."""
    modes_before = [submodule.training for submodule in module.modules()]
    _set_modes(module, modes)
    try:
        yield
    finally:
        _set_modes(module, modes_before)


def _set_modes(module: nn.Module, modes: list[bool]) -> None:
    for submodule, training in zip(module.modules(), modes, strict=True):
        submodule.training = training


@dataclass(frozen=True)
class Numerics:
    """Global switches of torch that choose between kernels or precisions; recomputation needs those of forward.

    values: what each of `_SWITCHES` was. Users may set them around the forward pass only (`sdpa_kernel`, TF32).
    """

    values: tuple[Any, ...]

    @staticmethod
    def now() -> Numerics:
        return Numerics(tuple(read() for read, _ in _SWITCHES))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the switches have these values; those that have them already are not set."""
        current = Numerics.now()
        changed = [i for i, value in enumerate(self.values) if value != current.values[i]]
        for i in changed:
            _SWITCHES[i][1](self.values[i])
        try:
            yield
        finally:
            for i in changed:
                _SWITCHES[i][1](current.values[i])


@contextmanager
def run_again(autocast: AutocastState, numerics: Numerics, rng: Tensor | None, device: torch.device) -> Iterator[None]:
    """Inside, a function that the forward pass ran does the same again, and autograd records it. The arguments are as
    they were in the forward pass; rng: None: no random numbers were drawn."""
    with torch.enable_grad(), numerics.entered(), autocast.entered(), replayed_rng(rng, device):
        yield


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


# (read, write) of each switch. The precision of float32 matrix products covers TF32.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _flag(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    _flag(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
)


@contextmanager
def unhooked() -> Iterator[None]:
    """Inside, saved-tensor hooks of the caller (offloading) are not called: what is saved is mostly freed at once."""
    with torch.autograd.graph.saved_tensors_hooks(_without_history, _as_packed):
        yield


def _without_history(tensor: Tensor) -> Tensor:
    # A node that holds its own output with its history would be a reference cycle, freed only by gc.
    return tensor.detach()


def _as_packed(tensor: Tensor) -> Tensor:
    return tensor
