"""A run that kills.py begins, resumes and kills: its cells, and where they run.

    python reports/campaigns/killed_run.py ENGINE LOAD JOBS FOLDER

MEFTBENCH_RAY has the address of the cluster for `ray`, SLURM_CONF the file of the cluster for `slurm`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite
from meftbench.runner import run_suite
from meftbench.runner.engine import Engine
from meftbench.runner.local_engine import LocalEngine

ADDRESS = "MEFTBENCH_RAY"
STAND_IN = (sys.executable, "-m", "meftbench.worker", "--requests", "stand_in")
BRIEF = 1  # the seed for which tests/stand_in.py sleeps for 10 ms


@dataclass(frozen=True)
class Load:
    """Cells to run and the worker that runs them.

    command: None: meftbench's own.  has_numbers_of: whether a record's numbers can be those of a cell.
    """

    suite: Suite
    command: tuple[str, ...] | None
    has_numbers_of: Callable[[Cell, float], bool]


def stand_in(cells: int) -> Load:
    """Cells that sleep for 10 ms, measured by tests/stand_in.py, which makes their numbers of their batch size."""
    suite = Suite(
        "kills",
        "",
        Protocol(on_oom="record"),
        tuple(
            Cell.of(model="bert-base@random", method="full", batch_size=size, sequence_length=16, seed=BRIEF)
            for size in range(1, cells + 1)
        ),
        None,
    )
    return Load(suite, STAND_IN, lambda cell, peak_bytes: peak_bytes == 1000 * cell.batch_size)


def real(cells: int) -> Load:
    """At most eight cells of a tiny encoder with four methods, counted."""
    chosen = [
        Cell.of(model="bert-tiny@random", method=method, batch_size=size, sequence_length=16)
        for size in (1, 2)
        for method in ("full", "lora+checkpoint", "meft1-exact", "meft2")
    ]
    protocol = Protocol(warmup=1, steps=1, passes=("memory",))
    return Load(
        Suite("kills", "", protocol, tuple(chosen[:cells]), None), None, lambda cell, peak_bytes: peak_bytes > 0
    )


LOADS: dict[str, Callable[[int], Load]] = {"stand-in": stand_in, "real": real}
CELLS = {"local": 48, "ray": 40, "slurm": 10}  # on Slurm each takes seconds to begin


def _engine(name: str, jobs: int, load: Load) -> Engine:
    if name == "ray":
        from meftbench.runner.ray_engine import RayEngine

        return RayEngine(os.environ[ADDRESS], jobs, load.command)
    if name == "slurm":
        from meftbench.runner import slurm_jobs
        from meftbench.runner.slurm_engine import SlurmEngine

        slurm_jobs.STATE_SECONDS = 1.0  # a cluster that nobody else asks
        return SlurmEngine({}, jobs, command=load.command)
    return LocalEngine(jobs, (), load.command, None)


def main(engine: str, load: str, jobs: str, folder: str) -> int:
    """Begin, or resume, the run; the exit code."""
    chosen = LOADS[load](CELLS[engine])
    try:
        run_suite(chosen.suite, Path(folder), resume=True, engine=_engine(engine, int(jobs), chosen))
    except UserError as error:  # as the command ends; any other exception ends the process with 1
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
