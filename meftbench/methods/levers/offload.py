"""`+offload` (a lever): tensors saved for the backward pass are held in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, LeverNumber, WatchedStep, held_at

# True while a copy to the host is made. Without an accelerator, host and device share one memory, and the probe that
# counts device bytes must be able to leave the copies out (probes/memory_counted.py).
copying_to_host: ContextVar[bool] = ContextVar("copying_to_host", default=False)
MEMORYLESS = ("cpu", "meta")  # devices without a memory of their own


class Offload(Lever):
    """Tensors saved for the backward pass are held in host memory; with `+checkpoint`: the inputs of layers."""

    def __init__(self) -> None:
        self._host: HostMemory | None = None

    def apply(self, applied: Applied) -> None:
        self._host = HostMemory(applied.model)
        applied.surroundings.append(self._host)

    def without(self) -> AbstractContextManager[object]:
        return held_at(self._host, "enabled", False)

    @contextmanager
    def watched(self, applied: Applied) -> Iterator[None]:
        if self._host is not None:
            self._host.moved_bytes = 0
        yield

    def missing(self, seen: WatchedStep) -> str | None:
        return None if self._moved else "no byte was moved to the host"

    def numbers(self) -> dict[str, LeverNumber]:
        return {"offloaded_bytes": LeverNumber(self._moved, "counted")}

    @property
    def _moved(self) -> int:
        return self._host.moved_bytes if self._host else 0


class HostMemory:
    """Holds tensors saved for the backward pass in host memory, which is pinned where there is an accelerator.

    Like torch.autograd.graph.save_on_cpu, but parameters and buffers, which stay on the device anyway, are not moved.
    moved_bytes: bytes moved to the host since it was last set to 0.
    """

    def __init__(self, model: nn.Module) -> None:
        self.moved_bytes = 0
        self.enabled = True
        self._model = model

    def __call__(self) -> AbstractContextManager[object]:
        if not self.enabled:
            return ExitStack()
        resident = {t.untyped_storage()._cdata for t in [*self._model.parameters(), *self._model.buffers()]}

        def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
            if tensor.layout is not torch.strided or tensor.untyped_storage()._cdata in resident:
                return None, tensor
            token = copying_to_host.set(True)
            try:
                pinned, host_device = tensor.device.type not in MEMORYLESS, "meta" if tensor.is_meta else "cpu"
                host = torch.empty(tensor.size(), dtype=tensor.dtype, device=host_device, pin_memory=pinned)
                host.copy_(tensor, non_blocking=pinned)
            finally:
                copying_to_host.reset(token)
            self.moved_bytes += host.nbytes
            return tensor.device, host

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, tensor = packed
            if device is None:
                return tensor
            return tensor.clone() if device.type in MEMORYLESS else tensor.to(device, non_blocking=True)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
