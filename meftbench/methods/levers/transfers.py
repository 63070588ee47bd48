"""Copies between a device and host memory that run beside the computation, and the pinned memory that they need.

Without an accelerator the same calls copy at once, so that what is held where, and when, can be counted on a CPU and
traced on torch's meta device: there the host's tensors are of the same device type, and `allocating_as` tells them
apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

# The category in which the probe that counts storages (probes/memory_counted.py) books what is allocated now: "host"
# for memory of the host, "parameters" for copies of weights; None: that of the phase.
allocating_as: ContextVar[str | None] = ContextVar("allocating_as", default=None)
# Whether what is copied now goes to host memory or comes from there: without an accelerator it looks like any copy.
moving: ContextVar[bool] = ContextVar("moving", default=False)
ALIGNED = 512  # bytes: sizes of buffers are multiples, so that tensors of almost the same size share them
WITHOUT_MEMORY = ("cpu", "meta")  # devices whose tensors are in the host's memory, or in none


@contextmanager
def allocations_as(category: str) -> Iterator[None]:
    """Within it, what is allocated is counted in `category`."""
    token = allocating_as.set(category)
    try:
        yield
    finally:
        allocating_as.reset(token)


@contextmanager
def moved() -> Iterator[None]:
    """Within it, copies are counted as transfers between the device and host memory."""
    token = moving.set(True)
    try:
        yield
    finally:
        moving.reset(token)


class Transfers(Protocol):
    """Copies to and from one device, each after those that were begun before it."""

    def begin(self, target: Tensor, source: Tensor) -> Any:
        """Begin to copy what `source` holds once all computation queued by now is done. Returns what `wait` takes.

        Both must stay alive, and unchanged, until `wait` has been called: their memory is that of the computation.
        """
        ...

    def wait(self, begun: Any) -> None:
        """Computation that is queued from now on runs after the copy."""
        ...


class AtOnce:
    """Where there is no accelerator: a copy is done when `begin` returns."""

    def begin(self, target: Tensor, source: Tensor) -> None:
        with moved():
            target.copy_(source)

    def wait(self, begun: None) -> None:
        pass


class OnStream:
    """On a stream beside the one that computes. For copies that overlap, memory of the host must be pinned.

    Memory of a device tensor that is freed returns to the stream on which it was allocated, the computing one, and may
    be taken by whatever is queued there next. Because that is queued after `wait`, it runs after the copy, and
    `Tensor.record_stream`, which frees memory at a moment that depends on timing, is not needed.

    module: `torch.cuda`, or another with its streams.  Source: torch's notes on CUDA semantics, CUDA streams.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        self._device, self._module = device, module
        self._beside = module.Stream(device)

    def begin(self, target: Tensor, source: Tensor) -> Any:
        self._beside.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._beside):
            target.copy_(source, non_blocking=True)
        return self._beside.record_event()

    def wait(self, begun: Any) -> None:
        self._module.current_stream(self._device).wait_event(begun)


def transfers_of(device: torch.device) -> Transfers:
    """New transfers to and from `device`."""
    return AtOnce() if device.type in WITHOUT_MEMORY else OnStream(device, getattr(torch, device.type))


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A frozen tensor in host memory, pinned if `device` is an accelerator; `tensor` itself where it is none."""
    if device.type in WITHOUT_MEMORY:
        return tensor
    return tensor.cpu() if tensor.is_pinned() else tensor.cpu().pin_memory()


class HostBuffers:
    """Pinned buffers of the host, used again by the next step instead of allocated anew, which takes milliseconds each.

    What a whole step did not use is given back to torch, so that steps of ever other shapes do not collect buffers.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._unused: dict[int, list[Tensor]] = {}
        self.allocated = 0  # buffers made since the beginning

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer (uint8) of at least `nbytes` for data of `device`; its content is arbitrary."""
        size = -(-nbytes // ALIGNED) * ALIGNED
        for buffers in (self._free, self._unused):
            if buffers.get(size):
                return buffers[size].pop()
        self.allocated += 1
        with allocations_as("host"):
            if device.type in WITHOUT_MEMORY:
                return torch.empty(size, dtype=torch.uint8, device=device)
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give_back(self, buffer: Tensor) -> None:
        """Copies from the buffer that have begun are done before those that begin later, on the same transfers."""
        self._free[buffer.numel()].append(buffer)

    def begin_step(self) -> None:
        """Drop what was free at the beginning of the last step, and was not taken since."""
        self._unused, self._free = self._free, defaultdict(list)
