"""Out of memory at any allocation of whatever runs: torch's operators fail where they would allocate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REQUESTED = 3 * 2**20  # bytes that the failed allocation asked for, as its message says
# The errors by which torch 2.13 and Python say that there is no memory.
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 3.00 MiB. GPU 0 has a total capacity of 15.00 GiB of which 1.00 MiB is "
        "free."
    ),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        f"{REQUESTED} bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}


class FailingAllocations(TorchDispatchMode):
    """Counts the operators that return new storage, and raises in place of one of them.

    fail_at: the number of the allocation that fails, from 0; None: none does.  error: makes what is raised.
    count: allocations so far; after the one that fails, everything succeeds.  failed: whether it was reached.
    """

    def __init__(self, fail_at: int | None = None, error: str = "cuda") -> None:
        super().__init__()
        self.fail_at, self.error = fail_at, ERRORS[error]
        self.count, self.failed = 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _allocates(func):
            return func(*args, **(kwargs or {}))
        number, self.count = self.count, self.count + 1
        if number == self.fail_at:
            self.failed = True
            raise self.error()
        return func(*args, **(kwargs or {}))


def _allocates(func: Any) -> bool:
    """Whether an operator returns a tensor that is neither one of its arguments nor a view of one."""
    return any(isinstance(one.type, torch.TensorType | torch.ListType) and one.alias_info is None
               for one in func._schema.returns)  # fmt: skip


def storages_of(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
