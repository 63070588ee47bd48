"""Compares two runs cell by cell: what changed, and whether the change is more than noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from meftbench.catalogue.metrics import METRICS, NOT_A_NUMBER
from meftbench.errors import DONE, NOT_COMPARABLE, NOTHING_MATCHED, OVER_BUDGET, UserError, unknown
from meftbench.records.outcome import Figure, Outcome, equal_numbers, names_of, outcomes
from meftbench.records.store import Run
from meftbench.verdicts import noise
from meftbench.verdicts.change import UNMOVED, Change, Judgement
from meftbench.verdicts.comparable import ENVIRONMENT, TIME_UNITS, applies, check_comparable, differing, obstacles
from meftbench.verdicts.environment import differences
from meftbench.verdicts.growth import PEAKS, Growth, growth

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
_MEASURED_THRESHOLD = 0.01


@dataclass(frozen=True)
class Comparison:
    """What changed between two runs.

    changes: worst first.  only_first, only_second: labels of the cells that only one run has.
    cells: how many cells are in both runs.  notes: what was left out, or compared although conditions differ, and why.
    first, second: names of the runs.  differs: in what the runs differ beside their numbers (comparable.differing).
    grown: the cells of which a peak is higher, with the buffers and categories that grew.
    model: how the labels of all cells begin; "" where the runs have several models.
    """

    changes: list[Change]
    only_first: list[str]
    only_second: list[str]
    cells: int
    notes: list[str]
    first: str = ""
    second: str = ""
    differs: list[str] = field(default_factory=list)
    grown: list[Growth] = field(default_factory=list)
    model: str = ""

    @property
    def regressed(self) -> bool:
        return any(change.judgement == "worse" for change in self.changes)

    def shown(self, only_changed: bool) -> list[Change]:
        """All changes; with `only_changed`, those that are judged neither "noise" nor "same"."""
        return [c for c in self.changes if not only_changed or c.judgement not in UNMOVED]

    def counts(self) -> dict[Judgement, int]:
        counts = Counter(map(attrgetter("judgement"), self.changes))
        return {kind: counts[kind] for kind in _ORDER}

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
    Measured times count as changed only where their samples show it (verdicts/noise.py); without samples, or without
    scipy, where the quartiles of the two runs do not overlap. A note says which rule was used if it was the second.
    across: also compare values measured in different environments, and times taken with different numbers of CPU
        threads or on shared cores; notes say what differs. Without it those numbers are left out.

    Raises UserError: exit 2 for an unknown metric; exit 4 where protocol, schema or (for measured values)
    conditions of measuring (comparable.obstacles) differ; exit 5 where no cell, or no value of `metrics`, is in both.
    """
    chosen = list(metrics)
    for name in chosen:
        if name not in METRICS or name in NOT_A_NUMBER:
            raise unknown("--metric", "metric", name, METRICS.keys() - NOT_A_NUMBER)
    left = {outcome.cell_id: outcome for outcome in outcomes(first)}
    right = {outcome.cell_id: outcome for outcome in outcomes(second)}
    pairs = [(outcome, right[cell_id]) for cell_id, outcome in left.items() if cell_id in right]
    runs = f"{first.path}, {second.path}"
    if not pairs:
        cure = "compare runs of suites that share cells; `meftbench show RUN --cells` lists them"
        raise UserError(runs, "no cell is in both runs", cure, NOTHING_MATCHED)
    check_comparable(first, second, pairs)
    changes: list[Change] = []
    left_out: Counter[str] = Counter()  # measured numbers, by what differs
    of_other_source: Counter[tuple[str, str]] = Counter()  # numbers, by their source before and after
    by_obstacle: dict[str, None] = {}
    undecided: list[_Undecided] = []
    too_few: Counter[tuple[int, int]] = Counter()  # times, by the number of their samples before and after
    by_quartiles, has_test = 0, noise.available()
    for before, after in pairs:
        of_cell = obstacles(before, after)
        by_obstacle |= dict.fromkeys(of_cell)
        cell = _Cell(before, after, threshold, [] if across else of_cell, has_test)
        changes += cell.changes(chosen)
        left_out.update(cell.left_out)
        of_other_source.update(cell.of_other_source)
        undecided += cell.undecided
        too_few += cell.single
        by_quartiles += cell.by_quartiles
    decided, notes = _decided(undecided, too_few)
    changes += decided
    for (earlier, later), number in of_other_source.items():
        what = (
            f"{number} numbers are left out, since they were {earlier} in the first run and are {later} in the second"
        )
        if chosen and not changes:
            raise UserError(runs, what, "rerun one of them as the other was, or name other metrics", NOT_COMPARABLE)
        notes.append(what)
    if by_quartiles and not has_test:
        what = f"{by_quartiles} times are judged by whether their quartiles overlap, since scipy 1.15 is not installed"
        notes.append(f"{what}: {noise.INSTALL}")
    models = {outcome.records[0].model_label for outcome in [*left.values(), *right.values()]}
    return Comparison(
        changes=_in_order(changes),
        only_first=[outcome.label for cell_id, outcome in left.items() if cell_id not in right],
        only_second=[outcome.label for cell_id, outcome in right.items() if cell_id not in left],
        cells=len(pairs),
        notes=_notes(first, second, [*by_obstacle], left_out, across, bool(chosen), changes) + notes,
        first=str(first.path),
        second=str(second.path),
        differs=differing(first, second, pairs),
        grown=_grown(pairs, changes),
        model=models.pop() if len(models) == 1 else "",
    )


def _grown(pairs: Sequence[tuple[Outcome, Outcome]], changes: Iterable[Change]) -> list[Growth]:
    """What grew in each cell of which a peak is judged worse, the largest growth first."""
    cell_ids = {change.cell_id for change in changes if change.judgement == "worse" and change.metric in PEAKS}
    grown = [growth(before, after) for before, after in pairs if after.cell_id in cell_ids]
    return sorted(
        (cell for cell in grown if cell), key=lambda cell: -max(after - before for before, after in cell.peaks.values())
    )


def _notes(
    first: Run,
    second: Run,
    found: Sequence[str],
    left_out: Counter[str],
    across: bool,
    chosen: bool,
    changes: Sequence[Change],
) -> list[str]:
    """What was left out or compared although conditions differ.

    found: the obstacles.  left_out: how many measured numbers each of them left out.
    Raises UserError: exit 4 where nothing remains, or metrics that were asked for are left out; exit 5 where no value
    of the metrics asked for is in both runs.
    """
    runs = f"{first.path}, {second.path}"
    notes = []
    for what in found:
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
        raise UserError(runs, "no cell has these metrics in both runs", "name other metrics", NOTHING_MATCHED)
    return notes


def _in_order(changes: Iterable[Change]) -> list[Change]:
    """Worst first; of one judgement changes of status and missing numbers, then what became NaN, then the largest.
    Numbers that are equal come last, in the order of the cells."""
    different: list[Change] = []
    equal: list[Change] = []
    for change in changes:
        (equal if change.judgement == "same" and change.before == change.after else different).append(change)
    different.sort(key=lambda c: (_ORDER.index(c.judgement), not (c.statuses or c.missing), *_largest_first(c.share)))
    return different + equal


def exit_code(comparison: Comparison, fail_on_regression: bool) -> int:
    """1 where something is worse and `fail_on_regression` is set, else 0."""
    return OVER_BUDGET if fail_on_regression and comparison.regressed else DONE


class _Undecided(NamedTuple):
    """A measured time that changed by more than the threshold; whether that is more than noise is still to be judged.

    samples: of both runs.  of_time: the samples are of the step time, whose reciprocal the metric is.
    """

    change: Change
    tolerance: float
    samples: tuple[list[float], list[float]]
    of_time: bool


class _Cell:
    """A cell in both runs. obstacles: what keeps measured values of the two from being compared.  has_test: whether
    scipy is there to judge samples.

    left_out: how many measured values each obstacle left out.  undecided: times whose noise is still to be judged.
    single: times of which one run has a single sample, whose noise nobody knows, by the number of samples before and
        after.
    by_quartiles: how many times were judged without their samples.  of_other_source: how many numbers had one source
        before and have another after.
    """

    def __init__(
        self, left: Outcome, right: Outcome, threshold: float | None, obstacles: Sequence[str], has_test: bool
    ) -> None:
        self.left, self.right = left, right
        self.threshold, self.obstacles, self.has_test = threshold, obstacles, has_test
        self.left_out: Counter[str] = Counter()
        self.of_other_source: Counter[tuple[str, str]] = Counter()
        self.undecided: list[_Undecided] = []
        self.single: Counter[tuple[int, int]] = Counter()
        self.by_quartiles = 0

    def changes(self, chosen: Sequence[str]) -> list[Change]:
        """The status where it differs, and every metric that can be judged at once; the others become `undecided`."""
        left, right = self.left, self.right
        label, cell_id = left.label, left.cell_id
        changes: list[Change] = []
        if left.status != right.status:
            judgement: Judgement = "worse" if left.status == "ok" else ("better" if right.status == "ok" else "changed")
            statuses = (str(left.status), str(right.status))
            changes.append(Change(label, cell_id, "status", judgement, statuses=statuses))
        equal, recorded = equal_numbers(left, right), names_of(left)
        for name in chosen or _JUDGED:
            if name not in recorded:
                continue
            if number := equal.get(name):
                value, source = number["value"], number["source"]
                if not (self.obstacles and source == "measured"):
                    changes.append(Change.of_equal(label, cell_id, name, source, value))
                    continue
            before, after = left.figure(name), right.figure(name)
            if before is None or right.status != "ok":
                continue
            if after is not None and before.source != after.source:
                self.of_other_source[before.source, after.source] += 1
                continue
            if self.obstacles and before.source == "measured":
                applicable = [obstacle for obstacle in self.obstacles if applies(obstacle, name)]
                if applicable:
                    self.left_out[applicable[0]] += 1
                    continue
            if after is None:
                changes.append(self._missing(name, before))
            elif before.value == after.value:
                changes.append(Change(label, cell_id, name, "same", after.source, before.value, after.value))
            elif change := self._judged(name, before, after):
                changes.append(change)
        return changes

    def _missing(self, name: str, before: Figure) -> Change:
        """The change of a number that the second run lacks: worse, since nothing holds it any more, unless neither
        direction of the metric is better."""
        judgement: Judgement = "changed" if METRICS[name].better == "neither" else "worse"
        metric = self.right.metric(name)
        why = metric.absent if metric and metric.absent else "it has no such metric"
        change = Change(self.left.label, self.left.cell_id, name, judgement, before.source, before.value)
        return change._replace(missing=why)

    def _judged(self, name: str, before: Figure, after: Figure) -> Change | None:
        """The change; None where it has become `undecided`, since it depends on samples."""
        measured = after.source == "measured"
        tolerance = self.threshold if self.threshold is not None else (_MEASURED_THRESHOLD if measured else 0.0)
        direction = _direction(name, before, after)
        change = Change(self.left.label, self.left.cell_id, name, direction, after.source, before.value, after.value)
        if direction == "same":
            return change
        # Of an infinite value no share is known: what becomes finite has changed, whatever the tolerance.
        if math.isfinite(before.value) and abs(after.value - before.value) <= tolerance * abs(before.value):
            return change._replace(judgement="noise" if measured else "same")
        if not measured or METRICS[name].unit not in TIME_UNITS:
            return change
        # A speed is computed from the step time, and has no samples or quartiles of its own.
        of_time = METRICS[name].unit in _SPEEDS and _quartiles_overlap(before, after) is None
        source = "step_time_s" if of_time else name
        samples = noise.samples_of(self.left, source), noise.samples_of(self.right, source)
        if any(len(side) == 1 for side in samples):
            self.single[len(samples[0]), len(samples[1])] += 1
            return change._replace(judgement="noise")
        if self.has_test and all(len(side) >= 2 and min(side) > 0 and max(side) < math.inf for side in samples):
            self.undecided.append(_Undecided(change, tolerance, samples, of_time))
            return None
        self.by_quartiles += 1
        overlap = _quartiles_overlap(self.left.figure(source), self.right.figure(source))
        # Without quartiles on both sides the noise is unknown, so that a change is not reported as a regression.
        return change if overlap is False else change._replace(judgement="noise")


_JUDGED = tuple(name for name in METRICS if name not in NOT_A_NUMBER and name not in _NOT_JUDGED)
_SPEEDS = ("token/second", "sample/second")


def _direction(name: str, before: Figure, after: Figure) -> Judgement:
    """What the change is if it is no noise: same, worse, better, or changed where neither direction is better."""
    if before.value == after.value or (before.value != before.value and after.value != after.value):
        return "same"
    better = METRICS[name].better
    if better == "neither":
        return "changed"
    # nan is worse than any number, whichever direction is better.
    if after.value != after.value or before.value != before.value:
        return "worse" if after.value != after.value else "better"
    return "better" if (after.value > before.value) == (better == "higher") else "worse"


def _decided(undecided: Sequence[_Undecided], single: Counter[tuple[int, int]]) -> tuple[list[Change], list[str]]:
    """The changes of measured times as their samples show them, and notes on what could not be shown.

    single: times that no sample could show to have changed, by the number of samples before and after."""
    changes = []
    too_few = Counter(single)
    for (change, tolerance, _, of_time), found in zip(
        undecided, noise.evidences([item.samples for item in undecided]), strict=True
    ):
        evidence = found.inverted() if of_time else found
        too_few.update([] if evidence.enough else [evidence.n])
        judgement = change.judgement if evidence.shows_change(tolerance, (change.delta or 0) > 0) else "noise"
        changes.append(change._replace(judgement=judgement, evidence=evidence))
    if not too_few:
        return changes, []
    numbers = ", ".join(f"{before} and {after}" for before, after in sorted(too_few))
    what = f"{too_few.total()} times have too few samples to show a change ({numbers}, whatever they are)"
    return changes, [f"{what}: measure with `protocol: {{steps: 5}}` or more"]


def _quartiles_overlap(before: Figure | None, after: Figure | None) -> bool | None:
    """Whether the quartiles overlap; None where one side has none."""
    if before is None or after is None:
        return None
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None
    return before.low <= after.high and after.low <= before.high
