"""Out of memory at any allocation of whatever runs: torch's operators fail where they would allocate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REQUESTED = 3 * 2**20  # bytes that the failed allocation asked for, as messages of torch say
_CUDA = (
    "CUDA out of memory. Tried to allocate 3.00 MiB. GPU 0 has a total capacity of 15.00 GiB of which 1 MiB is free."
)
_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    f"{REQUESTED} bytes. Error code 12 (Cannot allocate memory)"
)
# How torch 2.13 and Python say that there is no memory.
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError(_CUDA),
    "cpu": lambda: RuntimeError(_CPU),
    "python": MemoryError,
}


class FailingAllocations(TorchDispatchMode):
    """Counts the operators that allocate what they return, and raises in place of one of them.

    fail_at: the number of the one that fails, from 0; None: none does.  error: what is raised, of ERRORS.
    count: how many there were so far.  failed: whether one has failed; those after it succeed.
    """

    def __init__(self, fail_at: int | None = None, error: str = "cuda") -> None:
        super().__init__()
        self.fail_at, self.error = fail_at, error
        self.count, self.failed = 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _allocates(func):
            self.count += 1
            if self.count - 1 == self.fail_at:
                self.failed = True
                raise ERRORS[self.error]()
        return func(*args, **(kwargs or {}))


def _allocates(func: Any) -> bool:
    """Whether an operator returns a tensor that is neither one of its arguments nor a view of one."""
    return any(
        isinstance(returned.type, torch.TensorType | torch.ListType) and returned.alias_info is None
        for returned in func._schema.returns
    )
