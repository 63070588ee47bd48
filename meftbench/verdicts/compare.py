"""Compares two runs cell by cell: what changed, and whether the change is more than noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from meftbench.catalogue.metrics import METRICS, SHARED_CORES
from meftbench.errors import DONE, NOT_COMPARABLE, NOTHING_MATCHED, OVER_BUDGET, UserError, unknown
from meftbench.records.outcome import Figure, Outcome, outcomes, said, said_apart
from meftbench.records.store import Run
from meftbench.verdicts.budgets import NOT_A_NUMBER
from meftbench.verdicts.environment import differences

Judgement = Literal["worse", "better", "changed", "noise", "same"]
_ORDER: tuple[Judgement, ...] = ("worse", "better", "changed", "noise", "same")
# These metrics describe the conditions of a measurement or the load of the host, not what the method costs.
_NOT_JUDGED = frozenset(
    {
        "device_shared",
        "cpu_wait_share",
        "clocks_mhz",
        "temperature_c",
        "power_w",
        "build_s",
        "passes_s",
        "host_rss_peak_bytes",
    }
)
# Units of metrics that are times or are computed from times.
_TIME_UNITS = ("second", "token/second", "sample/second")
_MEASURED_THRESHOLD = 0.01


@dataclass(frozen=True)
class Change:
    """One metric of one cell in both runs; or the cell's status where it differs (metric "status", no numbers)."""

    label: str
    cell_id: str
    metric: str
    judgement: Judgement
    source: str = ""
    before: int | float | None = None
    after: int | float | None = None
    statuses: tuple[str, str] | None = None

    @property
    def delta(self) -> float | None:
        """After minus before, in the metric's unit."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def share(self) -> float:
        """The change as a share of `before`; 0 where there is none, inf where `before` is 0."""
        if self.delta is None or not self.delta:
            return 0.0
        return self.delta / abs(self.before) if self.before else float("inf")

    def text(self) -> str:
        """`worse: LABEL: metric 412.0 MiB -> 430.0 MiB counted (+18.0 MiB, +4.37%)`, on one line."""
        return " ".join(f"{self.judgement}: {self.label}: {self.metric} {self.numbers()}".split())

    def numbers(self) -> str:
        """The two values with their source, and the change."""
        if self.statuses:
            return f"{self.statuses[0]} -> {self.statuses[1]}"
        if self.before is None or self.after is None or self.delta is None:
            return ""
        unit = METRICS[self.metric].unit
        before, after = said_apart(self.before, self.after, unit)
        if not self.delta:
            return f"{after} {self.source}, unchanged"
        if not math.isfinite(self.delta):
            same = self.before == self.after or (math.isnan(self.before) and math.isnan(self.after))
            return f"{after} {self.source}, unchanged" if same else f"{before} -> {after} {self.source}"
        sign = "-" if self.delta < 0 else "+"
        # A percentage is left out where the change is a hundred times the earlier value or more.
        share = f", {self.share:+.2%}" if abs(self.share) < 100 else ""
        return f"{before} -> {after} {self.source} ({sign}{said(abs(self.delta), unit)}{share})"


@dataclass(frozen=True)
class Comparison:
    """What changed between two runs.

    changes: worst first.  only_first, only_second: labels of the cells that only one run has.
    cells: how many cells are in both runs.  notes: what was left out, or compared although conditions differ, and why.
    """

    changes: list[Change]
    only_first: list[str]
    only_second: list[str]
    cells: int
    notes: list[str]

    @property
    def regressed(self) -> bool:
        return any(change.judgement == "worse" for change in self.changes)

    def shown(self, only_changed: bool) -> list[Change]:
        """All changes; with `only_changed`, those that are judged neither "noise" nor "same"."""
        return [c for c in self.changes if not only_changed or c.judgement not in ("same", "noise")]

    def counts(self) -> dict[Judgement, int]:
        return {kind: sum(c.judgement == kind for c in self.changes) for kind in _ORDER}

    def summary(self) -> str:
        """One line: how many numbers got each judgement, and how many cells only one run has."""
        counted = ", ".join(f"{count} {kind}" for kind, count in self.counts().items() if count)
        alone = [
            f"{len(labels)} only in {which}"
            for labels, which in ((self.only_first, "the first"), (self.only_second, "the second"))
            if labels
        ]
        return "; ".join(
            [f"{self.cells} cell{'s' * (self.cells != 1)} in both runs: {counted or 'no number in common'}", *alone]
        )


def _largest_first(share: float) -> tuple[bool, float]:
    """A key to sort changes by: those that are no number first, then the largest."""
    return not math.isnan(share), 0.0 if math.isnan(share) else -abs(share)


def compare(
    first: Run,
    second: Run,
    metrics: Iterable[str] = (),
    threshold: float | None = None,
    *,
    across: bool = False,
) -> Comparison:
    """What changed from `first` to `second`.

    metrics: compare only these; empty: all that are single numbers and present in both runs.
    threshold: changes up to this share of the first value are "same" (of measured values: "noise"); default 0 for
        counted and predicted values, 1 % for measured ones.
    Measured times count as changed only where the quartiles of the two runs do not overlap.
    across: also compare values measured in different environments, and times taken with different numbers of CPU
        threads or on shared cores; notes say what differs. Without it those numbers are left out.

    Raises UserError: exit 2 for an unknown metric; exit 4 where protocol, schema or (for measured values)
    conditions of measuring (`_obstacles`) differ; exit 5 where no cell, or no value of `metrics`, is in both.
    """
    chosen = list(metrics)
    for name in chosen:
        if name not in METRICS or name in NOT_A_NUMBER:
            raise unknown("--metric", "metric", name, METRICS.keys() - NOT_A_NUMBER)
    left = {outcome.cell_id: outcome for outcome in outcomes(first)}
    right = {outcome.cell_id: outcome for outcome in outcomes(second)}
    common = [cell_id for cell_id in left if cell_id in right]
    runs = f"{first.path}, {second.path}"
    if not common:
        cure = "compare runs of suites that share cells; `meftbench show RUN` lists them"
        raise UserError(runs, "no cell is in both runs", cure, NOTHING_MATCHED)
    _check_comparable(first, second, [(left[cell_id], right[cell_id]) for cell_id in common])
    changes: list[Change] = []
    left_out: Counter[str] = Counter()  # measured numbers, by what differs
    obstacles: dict[str, None] = {}
    for cell_id in common:
        cell_changes, skipped = _changes(left[cell_id], right[cell_id], chosen, threshold, across)
        changes += cell_changes
        left_out.update(skipped)
        obstacles |= dict.fromkeys(_obstacles(left[cell_id], right[cell_id]))
    notes = []
    for what in obstacles:
        why = "; ".join(differences(first.environment, second.environment)[:5]) or "environment_id differs"
        reason = f"the environments differ ({why})" if what == ENVIRONMENT else what
        if across:
            notes.append(f"compared although {reason}")
        elif left_out[what] and (chosen or not changes):
            cure = "rerun one of them as the other was, compare counted metrics, or tell it to: --across"
            what = f"measured in different environments ({why})" if what == ENVIRONMENT else f"not comparable: {what}"
            raise UserError(runs, what, cure, NOT_COMPARABLE)
        elif left_out[what]:
            notes.append(f"{left_out[what]} measured numbers are left out: {reason}")
    if chosen and not changes:
        raise UserError(runs, f"no cell has {', '.join(chosen)} in both runs", "name other metrics", NOTHING_MATCHED)
    return Comparison(
        changes=sorted(changes, key=lambda c: (_ORDER.index(c.judgement), not c.statuses, *_largest_first(c.share))),
        only_first=[outcome.label for cell_id, outcome in left.items() if cell_id not in right],
        only_second=[outcome.label for cell_id, outcome in right.items() if cell_id not in left],
        cells=len(common),
        notes=notes,
    )


def exit_code(comparison: Comparison, fail_on_regression: bool) -> int:
    """1 where something is worse and `fail_on_regression` is set, else 0."""
    return OVER_BUDGET if fail_on_regression and comparison.regressed else DONE


def _check_comparable(first: Run, second: Run, pairs: list[tuple[Outcome, Outcome]]) -> None:
    """Raises UserError (exit 4) where the records of a cell differ in schema or protocol."""
    runs = f"{first.path}, {second.path}"
    for left, right in pairs:
        schemas = left.records[-1].schema, right.records[-1].schema
        if schemas[0] != schemas[1]:
            what = f"records of schema {schemas[0]} and {schemas[1]}"
            raise UserError(runs, what, "rerun the older one", NOT_COMPARABLE)
        if left.records[-1].protocol_id != right.records[-1].protocol_id:
            protocols: list[dict[str, Any]] = [run.suite.get("protocol") or {} for run in (first, second)]
            why = "; ".join(differences(*protocols)[:5]) or "protocol_id differs"
            cure = "rerun one of them with the other's protocol"
            raise UserError(runs, f"measured with different protocols ({why})", cure, NOT_COMPARABLE)


ENVIRONMENT = "environment"


def _obstacles(left: Outcome, right: Outcome) -> list[str]:
    """What keeps measured values of the two from being compared: different environments, different numbers of CPU
    threads, or cores that other processes used while times were measured."""
    environments = {record.environment_id for record in (*left.records, *right.records)}
    obstacles = [ENVIRONMENT] if len(environments) > 1 else []
    threads = [_threads(outcome) for outcome in (left, right)]
    if threads[0] != threads[1] and all(threads):
        obstacles.append(f"CPU threads differ ({threads[0]} | {threads[1]})")
    waited = [outcome.figure("cpu_wait_share") for outcome in (left, right)]
    if any(share is not None and share.value > SHARED_CORES for share in waited):
        # The text is the same for every cell, since what is left out is counted by it.
        obstacles.append(f"cores were shared while timing (threads waited more than {SHARED_CORES:.0%} of the time)")
    return obstacles


def _threads(outcome: Outcome) -> str:
    """The numbers of CPU threads in a cell's records, as text; empty where older records lack them."""
    return ", ".join(sorted({str(record.cell["threads"]) for record in outcome.records if record.cell.get("threads")}))


def _changes(
    left: Outcome, right: Outcome, chosen: list[str], threshold: float | None, across: bool
) -> tuple[list[Change], Counter[str]]:
    """The changes of one cell, and how many measured values each obstacle left out."""
    changes: list[Change] = []
    if left.status != right.status:
        status_judgement: Judgement = (
            "worse" if left.status == "ok" else ("better" if right.status == "ok" else "changed")
        )
        statuses = (str(left.status), str(right.status))
        changes.append(Change(left.label, left.cell_id, "status", status_judgement, statuses=statuses))
    names = chosen or [name for name in METRICS if name not in NOT_A_NUMBER and name not in _NOT_JUDGED]
    left_out: Counter[str] = Counter()
    obstacles = [] if across else _obstacles(left, right)
    for name in names:
        before, after = left.figure(name), right.figure(name)
        if before is None or after is None or before.source != after.source:
            continue
        # Threads and shared cores affect times only; the environment affects every measured value.
        applicable = [
            obstacle for obstacle in obstacles if obstacle == ENVIRONMENT or METRICS[name].unit in _TIME_UNITS
        ]
        if after.source == "measured" and applicable:
            left_out[applicable[0]] += 1
            continue
        judgement = _judge(name, left, right, before, after, threshold)
        changes.append(Change(left.label, left.cell_id, name, judgement, after.source, before.value, after.value))
    return changes, left_out


def _judge(
    name: str, left: Outcome, right: Outcome, before: Figure, after: Figure, threshold: float | None
) -> Judgement:
    if before.value == after.value or (before.value != before.value and after.value != after.value):
        return "same"
    measured = after.source == "measured"
    tolerance = threshold if threshold is not None else (_MEASURED_THRESHOLD if measured else 0.0)
    if abs(after.value - before.value) <= tolerance * abs(before.value):
        return "noise" if measured else "same"
    if measured and METRICS[name].unit in _TIME_UNITS and _within_noise(name, left, right):
        return "noise"
    better = METRICS[name].better
    if better == "neither":
        return "changed"
    # nan is worse than any number, whichever direction is better.
    if after.value != after.value or before.value != before.value:
        return "worse" if after.value != after.value else "better"
    return "better" if (after.value > before.value) == (better == "higher") else "worse"


def _within_noise(name: str, left: Outcome, right: Outcome) -> bool:
    """Whether the quartiles of the two runs overlap, or are unknown.

    A speed (tokens/s) without quartiles of its own takes those of the step time that it is computed from.
    """
    overlaps = [_quartiles_overlap(left.figure(which), right.figure(which)) for which in (name, "step_time_s")]
    first_known = next((overlap for overlap in overlaps if overlap is not None), None)
    # Without quartiles on both sides the noise is unknown, so that a change is not reported as a regression.
    return first_known is None or first_known


def _quartiles_overlap(before: Figure | None, after: Figure | None) -> bool | None:
    """Whether the quartiles overlap; None where one side has none."""
    if before is None or after is None:
        return None
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None
    return before.low <= after.high and after.low <= before.high
