"""Counts bytes of live tensor storages: every storage is followed from birth to death (docs/design.md 6).

The counter sees what operators return, below autograd and in the backward pass. It does not see what a kernel allocates
and frees while it runs; on CUDA that is part of what the allocator reports beyond the count.
"""

from __future__ import annotations

import math
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meftbench.errors import CellFailure
from meftbench.measuring.optimizers import allocating_paged
from meftbench.methods.levers.transfers import allocating_as
from meftbench.probes.gradients_alive import GradientsAlive
from meftbench.probes.level_history import LevelHistory
from meftbench.probes.modules_running import ModulesRunning
from meftbench.probes.sharded_tensors import DTensor, local_part
from meftbench.units import format_bytes

CATEGORIES = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporaries", "inputs", "other")
GRADIENT = "gradient"  # in place of an operator in the events that `StorageCounter.arrived` writes
BLOCK = 512  # bytes: the CUDA caching allocator hands out multiples of this

_TORCH = str(Path(torch.__file__).parent)
_COUNTING = (__file__, str(Path(__file__).with_name("memory_counted.py")))

_BORN_IN = {"forward": "activations", "backward": "temporaries", "optimizer": "temporaries"}


@dataclass
class Peak:
    """The largest total seen, the phase it fell in, and what the bytes were."""

    total: int = 0
    phase: str = "load"
    breakdown: dict[str, int] = field(default_factory=dict)


class Origin(NamedTuple):
    """Where a storage came from: the operator, its first tensor's shape and dtype, its caller, and the module.

    module: the path, as of `module_paths`, of the one that owns the parameter, or in whose forward or backward the
        storage was allocated; None: not known, or no module of the model.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    place: str
    module: str | None = None


class StorageCounter(TorchDispatchMode):
    """Counts live bytes by category while it is entered.

    device_type: storages of other devices are not counted.  block: sizes are rounded up to it (1: not at all).
    limit: bytes above which an allocation ends the cell as `oom`; None: no limit.

    live: bytes now, by category.  phase: set by `mark`; it decides the category of new storages.  peak: since `reset`.
    attention_kernels: fused attention operators seen.
    busiest: largest total in forward and backward since `reset`.  explain_from: if a new busiest is at least this
        total, `explained` lists (bytes, category, origin) of what is alive then.
    history: of the levels since `reset`.
    modules: tells which module runs; None: origins are without.
    gradients: lifetimes of gradients.  busiest_at: the number of the allocation that led to `busiest`.
    events: None, or a list to which every allocation, end and change of category of a storage is appended:
        ("alloc" | "free" | "book" | "phase", key, bytes before rounding, category or phase, operator). Storages of the
        category `host` are among them.
    """

    def __init__(self, device_type: str = "cpu", block: int = BLOCK, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.block, self.limit = device_type, block, limit
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.total = self.host = self.host_peak = 0
        self.phase = "load"
        self.peak = Peak()
        self.phase_peaks: dict[str, int] = {}
        self.attention_kernels: set[str] = set()
        self.busiest, self.explain_from = 0, math.inf
        self.gradients, self.busiest_at = GradientsAlive(), 0
        self.explained: list[tuple[int, str, Origin]] = []
        self.history = LevelHistory()
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._origins: dict[int, Origin] = {}
        self._explained_at: dict[int, int] = {}  # where storages that are still alive stand in `explained`
        self._emptied: dict[int, tuple[weakref.ref[Any], str, Origin | None]] = {}  # storages of size 0, see `resized`
        self._op = "given"
        self.modules: ModulesRunning | None = None
        self.events: list[tuple[str, int, int, str, str]] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls operators on its local part, which come here
        result = func(*args, **kwargs or {})
        self.returned(func.__name__, result)
        return result

    def returned(self, name: str, result: Any) -> None:
        """Count the new storages in `result`, which the operator `name` returned."""
        if ("dot_product" in name or "varlen_attn" in name) and "backward" not in name:
            self.attention_kernels.add(name.partition(".")[0].strip("_"))
        category = _BORN_IN.get(self.phase, "other")
        self._op = name
        if isinstance(result, Tensor):
            self._see(result, category)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item, category)

    def book(self, tensor: Tensor, category: str, owner: str | None = None) -> None:
        """Count a storage that exists already, or move it to another category; one in host memory stays there. Of a
        sharded tensor, that of the part in this process.

        owner: the path of the module that it belongs to; None: the one that it was allocated in.
        """
        tensor = local_part(tensor)
        key = tensor.untyped_storage()._cdata
        entry = self._storages.get(key)
        if entry is None:
            self._see(tensor, category)
        elif entry[2] not in (category, "host"):
            reference, size, old_category = entry
            self._storages[key] = (reference, size, category)
            self.live[old_category] -= size
            self.live[category] += size
            if self.events is not None:
                self.events.append(("book", key, 0, category, ""))
        if owner is not None and key in self._origins and self._origins[key].module != owner:
            self._origins[key] = self._origins[key]._replace(module=owner)
            if (place := self._explained_at.get(key)) is not None:
                # Gradients of a reversible stack belong to its parameters, but reach them only after the peak.
                size, category_then, origin = self.explained[place]
                self.explained[place] = (size, category_then, origin._replace(module=owner))

    def arrived(self, gradient: Tensor | None) -> None:
        """Note that `gradient` is one of a trained parameter, or a part of its sum, so that its bytes do not grow with
        tokens. Its category does not change: it is that of the phase of its allocation until `book` is called. None:
        an autograd function gave none for this parameter."""
        if gradient is None:
            return
        key = local_part(gradient).untyped_storage()._cdata
        entry = self._storages.get(key)
        if entry is not None:
            self.gradients.arrived(key, entry[1])
            if self.events is not None:
                self.events.append(("book", key, 0, entry[2], GRADIENT))

    def mark(self, phase: str) -> None:
        """A phase begins: its peak starts at the bytes that are live now."""
        if self.events is not None:
            self.events.append(("phase", 0, 0, phase, ""))
        self.phase = phase
        if phase == "forward" and self.modules is not None:
            self.modules.forget()
        self.phase_peaks[phase] = max(self.phase_peaks.get(phase, 0), self.total)

    def reset(self) -> None:
        """Begin a window: peaks start at the bytes that are live now."""
        self.phase_peaks = {}
        self.peak = Peak(self.total, self.phase, dict(self.live))
        self.host_peak = self.host
        self.busiest, self.explained, self._explained_at = 0, [], {}
        self.history = LevelHistory()
        self.busiest_at = self.gradients.clock
        self.gradients.forget_ended()

    def _see(self, tensor: Tensor, category: str) -> None:
        if tensor.device.type != self.device_type or allocating_paged.get():
            return
        if tensor.layout is torch.sparse_coo:
            for part in (tensor._indices(), tensor._values()):
                self._see(part, category)
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        entry = self._storages.get(key)
        if entry is not None:
            if entry[1] == size:
                return
            self._forget(key, entry[0])  # resized in place
            category = entry[2]
        else:
            category = allocating_as.get() or category
        if size == 0:
            return
        if self.events is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            module = None if self.modules is None else self.modules.path()
            self._origins[key] = Origin(self._op, tuple(tensor.shape), dtype, _place(), module)
        self._add(storage, size, category, self._op)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """The size of a storage was changed in place, as fully_shard does to give gathered weights back and to take
        their memory again. What was empty keeps its category and its origin for that."""
        if storage.device.type not in (self.device_type, "meta"):  # meta: that of a fake tensor
            return
        key, size = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        entry = self._storages.get(key)
        if entry is not None:
            reference, _, category = entry
            self._emptied[key] = (reference, category, self._origins.get(key))
            self._forget(key, reference)
        if size == 0:
            return
        category = _BORN_IN.get(self.phase, "other")
        emptied = self._emptied.pop(key, None)
        if emptied is not None and emptied[0]() is not None:  # else another storage had this number
            _, category, origin = emptied
            if origin is not None:
                self._origins[key] = origin
        self._add(storage, size, category, "resize_")

    def _add(self, storage: torch.UntypedStorage, size: int, category: str, op: str) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda dead: self._forget(key, dead))
        self._storages[key] = (reference, size, category)
        if self.events is not None:
            self.events.append(("alloc", key, storage.nbytes(), category, op))
        self.gain(size, category)
        if category != "host":
            self.gradients.born(key)

    def gain(self, size: int, category: str) -> None:
        """Count `size` more bytes, already rounded. Raises CellFailure (oom) above the limit."""
        if category == "host":
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            return
        self.live[category] += size
        self.total += size
        self.gradients.clock += 1
        self.history.allocated(self.total, self.phase, self.live)
        self._raise_peaks(size)

    def lose(self, size: int, category: str) -> None:
        """Count `size` bytes less, already rounded."""
        if category == "host":
            self.host -= size
            return
        self.live[category] -= size
        self.total -= size

    def _forget(self, key: int, reference: weakref.ref[Any]) -> None:
        entry = self._storages.get(key)
        if entry is None or entry[0] is not reference:
            return
        _, size, category = self._storages.pop(key)
        self._origins.pop(key, None)
        self._explained_at.pop(key, None)
        self.gradients.ended(key)
        if self.events is not None:
            self.events.append(("free", key, 0, "", ""))
        self.lose(size, category)

    def _raise_peaks(self, requested: int) -> None:
        if self.total > self.phase_peaks.get(self.phase, 0):
            self.phase_peaks[self.phase] = self.total
        if self.total > self.peak.total:
            self.peak = Peak(self.total, self.phase, dict(self.live))
        if self.phase in ("forward", "backward") and self.total > self.busiest:
            self.busiest, self.busiest_at = self.total, self.gradients.clock
            if self._origins and self.total >= self.explain_from:
                keys = [key for key in self._storages if key in self._origins]
                self.explained = [(*self._storages[key][1:], self._origins[key]) for key in keys]
                self._explained_at = {key: place for place, key in enumerate(keys)}
        if self.limit is not None and self.total > self.limit:
            free = max(0, self.limit - self.total + requested)
            raise CellFailure(
                "oom",
                type="memory_limit",
                message=f"{format_bytes(requested)} more than fit into {format_bytes(self.limit)}",
                phase=self.phase,
                requested_bytes=requested,
                free_bytes=free,
                capacity_bytes=self.limit,
            )


def _place() -> str:
    """file:function of the caller that is neither torch's nor the counter's."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        path = frame.f_code.co_filename
        if _TORCH not in path and path not in _COUNTING:
            return f"{Path(path).stem}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
