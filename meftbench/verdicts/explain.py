"""Why a memory budget is exceeded: the buffers that grew, or without a run to hold against the largest at the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.records.outcome import Outcome, outcomes
from meftbench.records.store import Run
from meftbench.verdicts.growth import PEAKS, Part, changed_categories, grown_buffers, largest_buffers
from meftbench.verdicts.judge import Verdict

_PARTS_NAMED = 3


def exceeded(verdicts: Sequence[Verdict]) -> bool:
    """Whether `explained` has anything to say: a bound on memory is violated."""
    return any(_is_explained(verdict) for verdict in verdicts)


def explained(verdicts: Sequence[Verdict], run: Run, reference: Run | None) -> list[Verdict]:
    """The verdicts, those of violated bounds on memory with `cause`: what grew since `reference`, the run that the
    budgets are from; where it is None or lacks the cell, the largest buffers at the peak."""
    cells = {outcome.cell_id: outcome for outcome in outcomes(run)}
    before = {outcome.cell_id: outcome for outcome in outcomes(reference)} if reference else {}
    name = str(reference.path) if reference else ""
    return [
        replace(verdict, cause=_cause(verdict.metric, cells[verdict.cell_id], before.get(verdict.cell_id), name))
        if _is_explained(verdict) and verdict.cell_id
        else verdict
        for verdict in verdicts
    ]


def _is_explained(verdict: Verdict) -> bool:
    violated = verdict.state in ("over", "waived") and verdict.value is not None
    return violated and verdict.limit != "min" and verdict.metric in (*PEAKS, *BREAKDOWN)


def _cause(metric: str, outcome: Outcome, before: Outcome | None, reference: str) -> str:
    """`grew since RUN: ...`, or `largest at the peak: ...`; "" where the records say nothing of it."""
    category = metric.removesuffix("_bytes") if metric in BREAKDOWN else None
    buffers = grown_buffers(before, outcome) if before else None
    # Buffers are recorded at the peak of forward and backward, categories at that of the whole step.
    categories = changed_categories(before, outcome) if before and metric != "activation_peak_bytes" else ()
    if before and (buffers is not None or categories):
        grown = [f"category {part.text()}" for part in _grown(categories, category)]
        grown += [part.text() for part in _grown(buffers or (), category)]
        more = f"; and {len(grown) - _PARTS_NAMED} more" if len(grown) > _PARTS_NAMED else ""
        what = "; ".join(grown[:_PARTS_NAMED]) or "nothing that is recorded (buffers are from 1 % of the peak on)"
        return f"grew since {reference}: {what}{more}"
    largest = largest_buffers(outcome, category, _PARTS_NAMED)
    return f"largest at the peak of forward and backward: {'; '.join(largest)}" if largest else ""


def _grown(parts: Sequence[Part], category: str | None) -> list[Part]:
    return [part for part in parts if part.delta > 0 and category in (None, part.category)]
