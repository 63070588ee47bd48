"""Judges a run against its budgets. A row that matches no cell, or finds no value, gets a verdict too."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meftbench.catalogue.metrics import METRICS
from meftbench.errors import CELLS_FAILED, DONE, NOT_COMPARABLE, NOTHING_MATCHED, OVER_BUDGET
from meftbench.escapes import single_line
from meftbench.plan.budgets import Budgets, Missing, Row, glob
from meftbench.records.outcome import Figure, Outcome, outcomes, said, said_apart
from meftbench.records.store import Run
from meftbench.units import format_bytes
from meftbench.verdicts.environment import environment_names

State = Literal["over", "oom", "failed", "elsewhere", "unmatched", "missing", "warned", "waived", "held"]
# States with the exit codes that they lead to, worst first: the order in which verdicts are shown.
STATES: dict[State, int] = {
    "over": OVER_BUDGET,
    "oom": OVER_BUDGET,
    "failed": CELLS_FAILED,
    "elsewhere": NOT_COMPARABLE,
    "unmatched": NOTHING_MATCHED,
    "missing": NOTHING_MATCHED,
    "warned": DONE,
    "waived": DONE,
    "held": DONE,
}
# States that fail the check or not as the `missing` policy (error, warn, ignore) says.
_BY_POLICY = ("elsewhere", "unmatched", "missing")


@dataclass(frozen=True)
class Verdict:
    """The judgement of one row of the budgets on one cell (or, where it is `unmatched`, on none).

    value, bound: in the metric's unit; None where there is no value or no bound.
    limit: which bound: "max", "min", "warn" or "max_increase".
    message: what is wrong, without place and label; "" where held.
    cause: what the memory above a bound consists of (verdicts/explain.py); "" where it is not known.
    missing: the policy for the states elsewhere, unmatched and missing.
    wall_s: seconds that the cell took, all repeats together.
    """

    file: Path
    line: int
    metric: str
    state: State
    label: str
    cell_id: str | None = None
    source: str | None = None
    value: int | float | None = None
    bound: int | float | None = None
    limit: str | None = None
    message: str = ""
    missing: Missing = "error"
    wall_s: float = 0.0
    cause: str = ""

    @property
    def unit(self) -> str:
        return METRICS[self.metric].unit

    @property
    def headroom(self) -> float | None:
        """The distance from the value to the bound, in the metric's unit; negative where the bound is violated."""
        if self.value is None or self.bound is None:
            return None
        return self.value - self.bound if self.limit == "min" else self.bound - self.value

    @property
    def excess(self) -> float:
        """The size of a violation as a share of the bound, by which verdicts are ordered; inf where it is unknown."""
        if self.headroom is None or self.headroom != self.headroom:
            return float("inf")
        return -self.headroom / abs(self.bound) if self.bound else (float("inf") if self.headroom < 0 else 0.0)

    @property
    def fails(self) -> bool:
        """Whether the verdict makes the check fail."""
        return STATES[self.state] != DONE and (self.state not in _BY_POLICY or self.missing == "error")

    @property
    def silent(self) -> bool:
        """Whether a report may leave the verdict out."""
        return self.state == "held" or (self.state in _BY_POLICY and self.missing == "ignore")

    def text(self) -> str:
        """`file:line: label: metric value (source) is over max ...`; one line, whatever the label holds."""
        place = f"{self.file}:{self.line}: {self.label}: {self.metric}"
        return single_line(f"{place} {self.message}{f'; {self.cause}' if self.cause else ''}")


def judge(
    run: Run,
    budgets: Budgets,
    baseline: Run | None = None,
    missing: Missing | None = None,
    today: datetime.date | None = None,
) -> list[Verdict]:
    """Judge each row on each cell that it matches, and return the verdicts, worst first.

    Where several rows match a cell with the same metric and source, only the last one is judged.

    baseline: the run whose values rows with `baseline: true` start from.  missing: overrides the file's policy.
    today: decides whether waivers have expired; default: the current date in UTC.
    """
    day = today or datetime.datetime.now(datetime.UTC).date()
    cells = outcomes(run)
    before = {outcome.cell_id: outcome for outcome in outcomes(baseline)} if baseline else {}
    verdicts: list[Verdict] = []
    for outcome, index in winners(cells, budgets):
        verdicts.append(_Case(run, budgets, index, missing, before, day).of(outcome))
    for index, row in enumerate(budgets.rows):
        if not any(row.matches(outcome) for outcome in cells):
            verdicts.append(_unmatched(budgets, index, row, missing))
    return sorted(verdicts, key=lambda verdict: (list(STATES).index(verdict.state), -verdict.excess))


def winners(cells: Iterable[Outcome], budgets: Budgets) -> list[tuple[Outcome, int]]:
    """Pairs of a cell and the index of a row that judges it: of rows on the same metric and source, the last."""
    chosen: dict[tuple[str, str, str | None], tuple[Outcome, int]] = {}
    for outcome in cells:
        for index, row in enumerate(budgets.rows):
            if row.matches(outcome):
                figure = outcome.figure(row.metric)
                # A row that names no source takes the source of the cell's value.
                source = row.source or (figure.source if figure else None)
                chosen[outcome.cell_id, row.metric, source] = (outcome, index)
    return list(chosen.values())


def exit_code(verdicts: list[Verdict]) -> int:
    """0 held · 1 over budget · 3 a bounded cell failed · 4 another environment · 5 a row or number is missing.

    The lowest of those that apply, so that what is certain comes before what is unknown; 5 where nothing was judged.
    """
    codes = [STATES[verdict.state] for verdict in verdicts if verdict.fails]
    if codes:
        return min(codes)
    judged = any(verdict.state not in _BY_POLICY for verdict in verdicts)
    return DONE if judged else NOTHING_MATCHED


@dataclass(frozen=True)
class _Case:
    """What is needed to judge row number `index` on a cell. before: cells of the baseline run, by cell_id."""

    run: Run
    budgets: Budgets
    index: int
    missing: Missing | None
    before: dict[str, Outcome]
    today: datetime.date

    @property
    def row(self) -> Row:
        return self.budgets.rows[self.index]

    def of(self, outcome: Outcome) -> Verdict:
        """The verdict of the row on this cell."""
        row, worst = self.row, outcome.worst
        if outcome.status in ("error", "timeout"):
            return self._verdict(outcome, "failed", message=f"not measured: the cell ended in {_ended(outcome)}")
        if outcome.status == "oom":
            return self._waived(self._verdict(outcome, "oom", message=f"not held: the cell ended in {_ended(outcome)}"))
        if outcome.status == "skipped":
            why = worst.status_detail.get("message") or worst.status_detail.get("type") or "not started"
            return self._verdict(outcome, "missing", message=f"not measured: the cell was skipped ({why})")
        figure = outcome.figure(row.metric)
        if figure is None or (row.source and figure.source != row.source):
            return self._verdict(outcome, "missing", message=f"not measured: {_why_absent(outcome, row, figure)}")
        if row.environment and not any(
            glob(row.environment.lower()).fullmatch(name.lower()) for name in environment_names(self.run)
        ):
            here = ", ".join(environment_names(self.run)) or "unknown"
            message = f"not comparable: the row is for environment {row.environment}, the run is from {here}"
            return self._verdict(outcome, "elsewhere", figure, message=message)
        return self._against_bounds(outcome, figure)

    def _against_bounds(self, outcome: Outcome, figure: Figure) -> Verdict:
        row, tolerance = self.row, self.budgets.tolerance(self.row, figure.source)
        bounds: list[tuple[str, float, float]] = []  # name, as written, with tolerance
        start: float | None = None
        if row.max is not None:
            bounds.append(("max", row.max, _beyond(row.max, tolerance)))
        if row.min is not None:
            bounds.append(("min", row.min, _beyond(row.min, -tolerance)))
        if row.max_increase is not None:
            start = self._baseline(outcome)
            if start is None:
                cure = "name a run with --baseline, or write the value under `baseline`"
                return self._verdict(outcome, "missing", figure, message=f"not judged: no baseline for it; {cure}")
            limit = row.max_increase.above(start)
            bounds.append(("max_increase", limit, limit))
        for name, written, limit in bounds:
            unchanged = name == "max_increase" and figure.value != figure.value and start != start
            if not _within(figure.value, name, limit) and not unchanged:
                direction = "under" if name == "min" else "over"
                message = _sentence(direction, figure, name, written, METRICS[row.metric].unit)
                return self._waived(self._verdict(outcome, "over", figure, written, name, message))
        if row.warn is not None and not _within(figure.value, "max", row.warn):
            message = _sentence("over", figure, "warn", row.warn, METRICS[row.metric].unit)
            return self._verdict(outcome, "warned", figure, row.warn, "warn", message)
        tightest = min(bounds, key=lambda bound: abs(bound[1] - figure.value), default=None)
        if tightest is None:
            return self._verdict(outcome, "held", figure, row.warn, "warn")
        return self._verdict(outcome, "held", figure, tightest[1], tightest[0])

    def _baseline(self, outcome: Outcome) -> float | None:
        """The value that `max_increase` is added to; None where there is none for this cell."""
        baseline = self.row.baseline
        if baseline is True:
            before = self.before.get(outcome.cell_id)
            figure = before.figure(self.row.metric) if before else None
            return figure.value if figure else None
        return baseline.get(outcome.label) if isinstance(baseline, dict) else baseline

    def _waived(self, verdict: Verdict) -> Verdict:
        """The verdict with the state "waived", if the row has a waiver that has not expired."""
        expires = self.row.expires
        if expires is None:
            return verdict
        if self.today > expires:
            return _changed(verdict, message=f"{verdict.message}; its waiver ({self.row.reason}) ended on {expires}")
        message = f"{verdict.message}; waived until {expires}: {self.row.reason}"
        return _changed(verdict, state="waived", message=message)

    def _verdict(
        self,
        outcome: Outcome,
        state: State,
        figure: Figure | None = None,
        bound: float | None = None,
        limit: str | None = None,
        message: str = "",
    ) -> Verdict:
        return Verdict(
            file=self.budgets.file,
            line=self.budgets.line(self.index),
            metric=self.row.metric,
            state=state,
            label=outcome.label,
            cell_id=outcome.cell_id,
            source=figure.source if figure else self.row.source,
            value=figure.value if figure else None,
            bound=bound,
            limit=limit,
            message=message,
            missing=self.missing or self.row.missing or self.budgets.default.missing,
            wall_s=sum(record.wall_s for record in outcome.records),
        )


def _changed(verdict: Verdict, **fields: Any) -> Verdict:
    return Verdict(**(vars(verdict) | fields))


def _beyond(bound: float, tolerance: float) -> float:
    # Without a tolerance the bound stays an int: a float cannot tell neighbouring bytes above 2^53 apart.
    return bound + abs(bound) * tolerance if tolerance else bound


def _within(value: float, which: str, limit: float) -> bool:
    # Written so that nan is never within a bound.
    return value >= limit if which == "min" else value <= limit


def _sentence(direction: str, figure: Figure, which: str, bound: float, unit: str) -> str:
    value, limit = said_apart(figure.value, bound, unit)
    gap = abs(figure.value - bound)
    # The percentage is left out from ten times the bound on.
    share = f" ({gap / abs(bound):.2%})" if bound and gap < 10 * abs(bound) else ""
    amount = "" if gap != gap or gap == float("inf") else f"; {direction} by {said(gap, unit)}{share}"
    return f"{value} ({figure.source}) is {direction} {which} {limit}{amount}"


def _ended(outcome: Outcome) -> str:
    detail = outcome.worst.status_detail
    requested = detail.get("requested_bytes")
    if outcome.status == "oom" and isinstance(requested, int):
        return f"oom (asked for {format_bytes(requested)})"
    why = detail.get("message") or detail.get("type")
    return f"{outcome.status} ({str(why).splitlines()[0]})" if why else outcome.status


def _why_absent(outcome: Outcome, row: Row, figure: Figure | None) -> str:
    if figure is not None:
        return f"the cell has a {figure.source} value, the row wants a {row.source} one"
    metric = outcome.metric(row.metric)
    return metric.absent if metric and metric.absent else "the cell has no such metric"


def _unmatched(budgets: Budgets, index: int, row: Row, missing: Missing | None) -> Verdict:
    terms = "".join(f", {name}={value}" for name, value in row.when.items()) + (f", {row.source}" if row.source else "")
    return Verdict(
        file=budgets.file,
        line=budgets.line(index),
        metric=row.metric,
        state="unmatched",
        label=row.match,
        source=row.source,
        message=f"matches no cell of the run (match {row.match!r}{terms})",
        missing=missing or row.missing or budgets.default.missing,
    )
