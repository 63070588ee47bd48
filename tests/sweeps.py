"""Suites and sweeps for tests of the harness: the real worker with the stand-in measurement."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from builders import a_cell
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite
from meftbench.records.store import Run
from meftbench.runner import run_suite

WORKER = (sys.executable, "-m", "meftbench.worker", "--requests", "stand_in")
TESTS = Path(__file__).parent


def a_suite(*cells: Cell, name: str = "toy", **protocol: Any) -> Suite:
    """One cell on bert-base@random unless others are given."""
    return Suite(name, "", Protocol(**({"on_oom": "record"} | protocol)), cells or (a_cell(),), None)


def does(*behaviours: int) -> list[Cell]:
    """A cell for each behaviour of the stand-in, all different."""
    return [a_cell(seed=behaviour, sequence_length=16 + n) for n, behaviour in enumerate(behaviours)]


def sweep(suite: Suite, out: Path, **options: Any) -> Run:
    return run_suite(suite, out, **({"command": WORKER} | options))


def statuses(run: Run) -> list[str]:
    return [record.status for record in run.records]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Any) -> None:
    """Come back when it holds; pytest's time limit is the only limit."""
    while not condition():
        time.sleep(0.005)


def told(file: Path, word: str = "") -> list[list[str]]:
    """The whole lines that stand-ins have written, split at spaces; only those that begin with `word`."""
    text = file.read_text() if file.exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n") and line.startswith(word)]


def path_for_workers() -> str:
    """PYTHONPATH with which a worker finds the stand-in."""
    return os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
