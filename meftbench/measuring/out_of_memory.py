"""Turns an out-of-memory error into a result of the cell, with its details."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from meftbench.errors import CellFailure, is_out_of_memory
from meftbench.units import requested_bytes


@contextmanager
def out_of_memory_as_result(phase: Callable[[], str]) -> Iterator[None]:
    """Within it, running out of the host's or the device's memory raises CellFailure with status `oom`.

    phase: called at the failure, for the phase that was running.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if not is_out_of_memory(error):
            raise
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (None, None)
        raise CellFailure(
            "oom",
            type=type(error).__name__,
            message=text.splitlines()[0] if text else "out of memory",
            phase=phase(),
            requested_bytes=requested_bytes(text),
            free_bytes=free,
            capacity_bytes=total,
        ) from error
