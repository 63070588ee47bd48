"""`+offload` (a lever): tensors saved for the backward pass wait for it in host memory.

torch's own `save_on_cpu` copies a tensor once for each operation that saves it, and on the stream that computes; the
contexts of TRL and torchtune are tied to CUDA, so that what they hold could be neither counted nor predicted.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

import meftbench.methods.levers.saved
import meftbench.reversible.stack
from meftbench.catalogue.levers import Offload as OffloadSettings
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, LeverNumber, WatchedStep, held_at
from meftbench.methods.levers.saved import Held, given_back
from meftbench.methods.levers.transfers import HostBuffers, Transfers, allocations_as, transfers_of


class Offload(Lever):
    """Tensors saved for the backward pass are held in host memory; with `+checkpoint`: the inputs of layers."""

    def __init__(self, settings: OffloadSettings) -> None:
        self._settings = settings
        self._host: HostMemory | None = None

    def apply(self, applied: Applied) -> None:
        self._host = HostMemory(applied.model, self._settings)
        applied.saving.keepers.append(self._host)
        for stack in applied.stacks:
            stack.side_memory = self._host

    def without(self) -> AbstractContextManager[object]:
        return held_at(self._host, "enabled", False)

    @contextmanager
    def watched(self, applied: Applied) -> Iterator[None]:
        if self._host is not None:
            self._host.moved_bytes = self._host.returned_bytes = 0
        yield

    def forget_steps(self) -> None:
        if self._host is not None:
            self._host.buffers = HostBuffers()

    def missing(self, seen: WatchedStep) -> str | None:
        return None if self._host and self._host.moved_bytes else "no byte was moved to the host"

    def numbers(self) -> dict[str, LeverNumber]:
        moved, returned = (self._host.moved_bytes, self._host.returned_bytes) if self._host else (0, 0)
        return {"offloaded_bytes": LeverNumber(moved, "counted"), "returned_bytes": LeverNumber(returned, "counted")}


class HostMemory:
    """Holds saved tensors in host memory; parameters and buffers, which are on the device anyway, stay there.

    A storage is copied once, however many operations save it or a view of it. Its memory on the device is free when
    `in_flight` later copies have begun. In the backward pass, which needs tensors in the reverse order, the copies of
    the `in_flight` - 1 storages that are needed next begin before they are needed. A storage that several operations
    read one after the other is brought back once for them.

    moved_bytes, returned_bytes: moved to the host, and back to the device, since they were last set to 0.
    enabled: False: saved tensors are left on the device.
    """

    def __init__(self, model: nn.Module, settings: OffloadSettings) -> None:
        self.settings = settings
        self.moved_bytes = self.returned_bytes = 0
        self.enabled = True
        self.buffers = HostBuffers()
        self._model = model
        self._transfers: Transfers | None = None
        self._resident: set[int] = set()
        self._copies: dict[tuple[Any, ...], _Copy] = {}  # by what was saved; see `_part`
        self._saved: dict[int, weakref.ref[_Saved]] = {}  # by number, in the order in which they were saved
        self._number = 0
        self._in_flight: deque[_Copy] = deque()
        self._ahead: dict[_Copy, Tensor] = {}  # on the device, because they are needed next

    def begin(self) -> bool:
        if self.enabled and not self._saved:
            self._number = 0
            self.buffers.begin_step()
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._resident = {tensor.untyped_storage()._cdata for tensor in tensors}
        return self.enabled

    def hold(self, tensor: Tensor) -> Held | None:
        if not self.enabled or (self.settings.what == "checkpoints" and not _recomputed_from()):
            return None
        return self.copied(tensor)

    def side(self, tensor: Tensor) -> Any:
        """Side information of a reversible stack; what is returned is to be given to `given_back`."""
        return (self.copied(tensor) if self.enabled else None) or tensor

    def given_back(self, held: Any) -> Tensor:
        return given_back(held)

    def copied(self, tensor: Tensor) -> _Saved | None:
        """Begin to copy a tensor to the host; None: it stays on the device."""
        storage = tensor.untyped_storage()
        strided = tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()
        if not strided or storage._cdata in self._resident:
            return None
        key, flat = self._part(tensor)
        if flat.nbytes < self.settings.minimum_bytes:
            return None
        copy = self._copies.get(key)
        if copy is None or copy.source() is not storage:  # a storage that has died may have left its address to another
            copy = self._copies[key] = self._begin(key, flat, storage)
        whole = len(key) == 3
        geometry = (tensor.size(), tensor.stride(), tensor.storage_offset())
        saved = _Saved(self, copy, self._number, *(geometry if whole else (tensor.size(), None, 0)))
        copy.uses += 1
        self._saved[self._number] = weakref.ref(saved)
        self._number += 1
        return saved

    def _part(self, tensor: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """What is copied of a tensor, in one dimension, and what it is known by: its whole storage; or the tensor alone
        where that is less than half of it, such as the first token of each sample."""
        storage = tensor.untyped_storage()
        items, odd = divmod(storage.nbytes(), tensor.itemsize)
        key = (storage._cdata, tensor._version, tensor.dtype)
        whole = not odd and 2 * tensor.numel() >= items
        known = self._copies.get(key)
        # A storage that has died may have left its address to this one, and its copy may still be there.
        if whole or (known is not None and known.source() is storage):
            return key, tensor.detach().as_strided((items,), (1,), 0)
        part = (*key, tensor.size(), tensor.stride(), tensor.storage_offset())
        return part, tensor.detach().reshape(-1)

    def _begin(self, key: tuple[Any, ...], flat: Tensor, storage: Any) -> _Copy:
        self._transfers = self._transfers or transfers_of(flat.device)
        buffer = self.buffers.take(flat.nbytes, flat.device)
        with allocations_as("host"):
            host = buffer[: flat.nbytes].view(flat.dtype)
            copy = _Copy(key, buffer, host, flat.device, weakref.ref(storage))
            copy.leaving = (flat, self._transfers.begin(host, flat))
        self.moved_bytes += flat.nbytes
        self._in_flight.append(copy)
        while len(self._in_flight) > self.settings.in_flight:
            self._left(self._in_flight.popleft())
        return copy

    def _left(self, copy: _Copy) -> None:
        """Computation that is queued from now on may use the memory that the copy was made from."""
        if copy.leaving is not None:
            assert self._transfers is not None
            self._transfers.wait(copy.leaving[1])
            copy.leaving = None

    def on_device(self, saved: _Saved) -> Tensor:
        """The flat tensor that `saved` is part of, on the device, once it has arrived."""
        saved.taken = True
        flat = self._requested(saved.copy)
        self._arrived(saved.copy)
        ahead: dict[_Copy, Tensor] = {}
        others = 0
        for number in range(saved.number - 1, -1, -1):
            reference = self._saved.get(number)
            before = None if reference is None else reference()
            if before is None or before.taken or before.copy in ahead:
                continue
            if before.copy is saved.copy:
                ahead[before.copy] = flat
                continue
            if others == self.settings.in_flight - 1:
                break
            others += 1
            ahead[before.copy] = self._requested(before.copy)
        for copy in self._ahead.keys() - ahead.keys():
            self._arrived(copy)
        self._ahead = ahead
        return flat

    def _requested(self, copy: _Copy) -> Tensor:
        """The copy's content on the device: what it was made from, if that is still there, or on its way back."""
        if copy.leaving is not None:
            return copy.leaving[0]
        flat: Tensor | None = copy.present()
        if flat is None:
            assert self._transfers is not None
            flat = torch.empty(copy.host.shape, dtype=copy.host.dtype, device=copy.device)
            copy.arriving = (self._transfers.begin(flat, copy.host),)
            copy.present = weakref.ref(flat)
            self.returned_bytes += flat.nbytes
        return flat

    def _arrived(self, copy: _Copy) -> None:
        if copy.arriving is not None:
            assert self._transfers is not None
            self._transfers.wait(*copy.arriving)
            copy.arriving = None

    def ended(self, saved: _Saved) -> None:
        """A saved tensor is not needed any more."""
        self._saved.pop(saved.number, None)
        copy = saved.copy
        copy.uses -= 1
        if copy.uses:
            return
        if self._copies.get(copy.key) is copy:
            del self._copies[copy.key]
        self._left(copy)
        self._arrived(copy)
        self._ahead.pop(copy, None)
        if copy in self._in_flight:
            self._in_flight.remove(copy)
        self.buffers.give_back(copy.buffer)


def _nothing() -> None:
    return None


class _Copy:
    """One storage, or a part of it, in host memory.

    host: the part of `buffer` that holds it, in one dimension.  source: the storage that it was made from.
    leaving: what it was made from and what to wait for, until that has been waited for.
    present: the tensor on the device, while there is one.  arriving: what to wait for before it is read.
    uses: saved tensors that are part of it.
    """

    def __init__(
        self, key: tuple[Any, ...], buffer: Tensor, host: Tensor, device: torch.device, source: weakref.ref[Any]
    ) -> None:
        self.key, self.buffer, self.host, self.device, self.source = key, buffer, host, device, source
        self.leaving: tuple[Tensor, Any] | None = None
        self.present: Any = _nothing
        self.arriving: tuple[Any] | None = None
        self.uses = 0


class _Saved:
    """A saved tensor that is held in host memory, for as long as autograd holds this object.

    taken: whether the backward pass has needed it already.
    """

    def __init__(
        self, memory: HostMemory, copy: _Copy, number: int, size: torch.Size, stride: Any, offset: int
    ) -> None:
        self._memory, self.copy, self.number = memory, copy, number
        self._size, self._stride, self._offset = size, stride, offset
        self.taken = False

    def __call__(self) -> Tensor:
        flat = self._memory.on_device(self)
        if self._stride is None:
            return flat.view(self._size)
        return flat.as_strided(self._size, self._stride, self._offset)

    def __del__(self) -> None:
        self._memory.ended(self)


# Files whose functions call the autograd functions that save what a recomputation begins with.
_RECOMPUTING = {torch.utils.checkpoint.__file__, meftbench.reversible.stack.__file__}
# Files of functions that stand between them and `_recomputed_from`.
_BETWEEN = {__file__, meftbench.methods.levers.saved.__file__, torch.autograd.function.__file__}


def _recomputed_from() -> bool:
    """Whether what is being saved is what a checkpointed layer or a reversible stack is recomputed from."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename in _RECOMPUTING
