"""How the cells of a run ended, as lines of text."""

from __future__ import annotations

from collections import Counter

from meftbench.catalogue.metrics import SHARED_CORES
from meftbench.escapes import single_line
from meftbench.plan.training import NOT_CHOSEN
from meftbench.records.outcome import as_number, names_of, outcomes
from meftbench.records.record import Record
from meftbench.records.store import Run
from meftbench.report.frame_columns import detail_of
from meftbench.report.views.not_run import not_run, to_go_on
from meftbench.units import format_bytes


def ending(run: Run, folder: str | None = None) -> str:
    """`12 cells: 10 ok, 1 oom, 1 error`; where some of its suite are left: `; 8 of 20 cells not run yet`, and what runs
    them. folder: of the run, as it is shown there."""
    cells = outcomes(run)
    statuses = Counter(outcome.status for outcome in cells)
    counts = ", ".join(f"{statuses[status]} {status}" for status in sorted(statuses, key=_first_ok))
    not_chosen = sum(outcome.worst.status_detail.get("type") == NOT_CHOSEN for outcome in cells)
    note = f" ({not_chosen} at a learning rate that another beat)" if not_chosen else ""
    left = f"; {left}: `{to_go_on(run, folder)}`" if (left := not_run(run)) else ""
    return f"{len(cells)} cell{'s' * (len(cells) != 1)}: {counts}{note}{left}"


def _first_ok(status: str) -> int:
    return ("ok", "oom", "timeout", "error", "skipped").index(status)


def failures(run: Run) -> list[str]:
    """A line for each cell that did not end ok or has no score: its label, how it ended, why."""
    cells = outcomes(run)
    not_ok = [outcome.worst for outcome in cells if outcome.status != "ok"]
    # A cell at a learning rate that another beat is no failure: the table of scores lists the rates tried.
    not_ok = [record for record in not_ok if record.status_detail.get("type") != NOT_CHOSEN]
    lines = [f"{single_line(record.label)}: {record.status}{_why(record)}" for record in not_ok]
    done = [outcome for outcome in cells if outcome.status == "ok" and outcome.cell.get("training")]
    absent = [(outcome.label, score.absent) for outcome in done if (score := outcome.metric("score"))]
    return lines + [single_line(f"{label}: no score ({why})") for label, why in absent if why is not None]


def shared_cores(run: Run) -> list[str]:
    """A line that says how many cells were timed while other processes held the cores; none if there are none."""
    waited = [as_number(record.value("cpu_wait_share")) for record in run.records]
    too_long = [share for share in waited if share is not None and share > SHARED_CORES]
    if not too_long:
        return []
    what = f"{len(too_long)} of {len(waited)} cells were timed while other processes held the cores (they waited up to"
    return [f"{what} {max(too_long):.0%} of the time): rerun them on a quiet machine before comparing times"]


def collapses(run: Run) -> list[str]:
    """A line for each cell whose loss or backward pass broke down, though it ended ok: its label and what happened."""
    ended = [outcome for outcome in outcomes(run) if outcome.status == "ok" and "collapse" in names_of(outcome)]
    collapse_metrics = [(outcome.label, outcome.metric("collapse")) for outcome in ended]
    return [single_line(f"{label}: {metric.value}") for label, metric in collapse_metrics if metric and metric.value]


def _why(record: Record) -> str:
    requested = record.status_detail.get("requested_bytes")
    parts = [f"asked for {format_bytes(requested)}"] if isinstance(requested, int) else []
    parts += [detail_of(record)] if detail_of(record) else []
    return f" ({'; '.join(parts)})" if parts else ""
