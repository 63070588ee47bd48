"""The prediction of a cell as the limit of its memory: the cell must not fail under it, nor leave much of it unused.

A prediction that is too low fails; one that is too high leaves memory unused. So each of them is tried where the step
really runs: on CUDA, where torch's allocator keeps to the limit, or on a CPU, where the counter of live bytes does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite

UNUSED = 0.03  # the share of a limit that may stay unused


@dataclass(frozen=True)
class Limited:
    """A cell that ran with its predicted peak as its limit, in bytes.

    status: of the cell, `ok` where the limit sufficed.  used: the most that it held, or None where it failed.
    """

    label: str
    limit: int
    status: str
    used: int | None

    @property
    def unused(self) -> float | None:
        """The share of the limit that stayed unused; None: the cell failed."""
        return None if self.used is None else 1 - self.used / self.limit

    @property
    def held(self) -> bool:
        """Whether the limit sufficed and was not too generous."""
        return self.used is not None and self.limit - self.used <= UNUSED * self.limit


def limited(
    limits: Iterable[tuple[Cell, int]], protocol: Protocol, tell: Callable[[str], None] = lambda line: None
) -> list[Limited]:
    """Run each cell with its limit (bytes), one after the other in processes of their own.

    The limit is held against what the cell's device counts: reserved memory on CUDA, live bytes on a CPU.
    """
    from meftbench.runner import run_suite

    found = []
    for cell, limit in limits:
        metric = "peak_reserved_bytes" if cell.device.startswith("cuda") else "peak_allocated_bytes"
        held_to = protocol.model_copy(update={"memory_limit": limit, "on_oom": "record", "repeats": 1})
        suite = Suite("limited", "", held_to, (cell,), None)
        with tempfile.TemporaryDirectory() as folder:
            (record,) = run_suite(suite, Path(folder) / "run").records
        used = record.value(metric)
        found.append(Limited(record.label, limit, record.status, used if isinstance(used, int) else None))
        tell(f"{record.label}: {record.status} within {limit:,} bytes")
    return found
