"""What a run still lacks of its suite, and the command that takes it up again."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from meftbench.plan.protocol import Protocol
from meftbench.records.store import Run


def cells_not_run(*runs: Run) -> tuple[int, int]:
    """How many cells of the runs' suites have no record, and how many the suites have.

    (0, 0) where no suite.yaml lists cells, as those of runs made by hand.
    """
    missing = every = 0
    for run in runs:
        recorded = {record.cell_id for record in run.records}
        cells = run.suite.get("cells") or ()
        missing += sum(cell["cell_id"] not in recorded for cell in cells)
        every += len(cells)
    return missing, every


def not_run(run: Run) -> str:
    """`3 of 4 cells not run yet`, and how many repeats are missing of those that were run; "" where nothing is."""
    missing, every = cells_not_run(run)
    parts = [f"{missing} of {every} cells not run yet"] if missing else []
    if repeats := _repeats_not_run(run):
        parts.append(f"{repeats} {'repeat' if repeats == 1 else 'repeats'} of cells not run yet")
    return ", ".join(parts)


def _repeats_not_run(run: Run) -> int:
    """How many repeats are missing of the cells that have a record of any."""
    repeats = (run.suite.get("protocol") or {}).get("repeats")
    protocol = Protocol.model_construct(repeats=repeats if type(repeats) is int else None)
    done = Counter(record.cell_id for record in run.records)  # one record for each repeat (`load_run`)
    wanted = {cell["cell_id"]: protocol.repeats_on(str(cell.get("device"))) for cell in run.suite.get("cells") or ()}
    return sum(max(0, wanted[cell_id] - number) for cell_id, number in done.items() if cell_id in wanted)


def to_go_on(run: Run, folder: str | Path | None = None, retry: str = "") -> str:
    """The command that takes the run up again. folder: as it is shown; default: where the run is.  retry: the statuses
    of cells to try again.

    With the settings of its cells that options may have laid over the suite: else it would be another run.
    """
    more: list[object] = ["--out", run.path if folder is None else folder, "--resume"]
    more += ["--retry", retry] if retry else []
    if command := run.suite.get("command"):
        return f"meftbench {command} {shlex.join(map(str, more))}"
    devices = {str(cell.get("device")) for cell in run.suite.get("cells") or ()}
    repeats = (run.suite.get("protocol") or {}).get("repeats")
    words = ["run", run.suite.get("source") or run.name]
    words += ["--device", *devices] if len(devices) == 1 else []
    words += ["--repeats", repeats] if repeats else []
    words += ["--allow-code"] if run.suite.get("own_code") else []
    return f"meftbench {shlex.join(map(str, [*words, *more]))}"
