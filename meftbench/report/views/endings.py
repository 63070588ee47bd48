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
    """A line for the cells that were timed while other processes held the cores, and one for those whose own ranks and
    threads are more than there were cores; none where there are no such cells."""
    waited: dict[bool, list[float]] = {False: [], True: []}
    for record in run.records:
        share = as_number(record.value("cpu_wait_share"))
        if share is not None and share > SHARED_CORES:
            waited[_asks_for_more_cores(run, record)].append(share)
    reasons = {
        False: ("while other processes held the cores", "rerun them on a quiet machine"),
        True: ("with more ranks and threads than there were cores", "rerun them with fewer, or on more cores"),
    }
    return [
        f"{len(shares)} of {len(run.records)} cells were timed {why} "
        f"(they waited up to {max(shares):.0%} of the time): {cure} before comparing times"
        for own, (why, cure) in reasons.items()
        if (shares := waited[own])
    ]


def _asks_for_more_cores(run: Run, record: Record) -> bool:
    """Whether the ranks and threads of a cell are more than the cores of the machine on which its run began."""
    cores = as_number((run.environment.get("host") or {}).get("cores"))
    ranks, threads = (as_number(record.cell.get(name)) or 1 for name in ("world_size", "threads"))
    return cores is not None and ranks * threads > cores


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
