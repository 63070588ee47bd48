"""A cell to be measured in a process of its own, and how that ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.records.record import Metric, Status


@dataclass(frozen=True)
class Job:
    """A cell to be measured in a process of its own.

    result, log: files; the log takes what the process prints.  timeout: seconds.  threads: CPU threads.
    memory_bytes: how much host memory the process may take; None: no limit.
    environment: variables set in the process before anything looks at a device.
    """

    cell: Cell
    repeat: int
    protocol: Protocol
    result: Path
    log: Path
    timeout: float
    threads: int = 1
    memory_bytes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """A machine on which cells run.

    host: its name.  environment: its environment.json.
    code: what its worker reports of the user's own functions (`own_code.looked_at`).
    """

    host: str
    environment: Mapping[str, Any]
    code: Mapping[str, Any] = field(default_factory=dict)

    @property
    def environment_id(self) -> str:
        return str(self.environment["environment_id"])


@dataclass(frozen=True)
class Outcome:
    """How a job ended. detail: `status_detail` of the record.  observed: fields of the cell known only after it ran.

    machine: on which it ran; None: the first of the engine's machines.
    lost: the machine, or the worker on it, was lost while the job ran: the job may be run again elsewhere.
    wall_s: seconds from giving the job to the worker until its process had ended, of a clock that nobody sets.
        finished_at is so much later than started_at.
    """

    job: Job
    status: Status
    detail: dict[str, Any]
    metrics: dict[str, Metric]
    observed: dict[str, Any]
    pid: int | None
    started_at: str
    finished_at: str
    wall_s: float
    machine: Machine | None = None
    lost: bool = False
