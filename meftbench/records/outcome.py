"""The outcome of a cell in a run: its repeats combined, in the same way for budgets, comparison and report."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

from meftbench.catalogue.metrics import METRICS
from meftbench.records.record import Metric, Record, Status, StoredMetrics
from meftbench.records.store import Run
from meftbench.units import format_bytes

# The status of a cell is that of its worst repeat.
_WORST_FIRST: tuple[Status, ...] = ("error", "timeout", "oom", "skipped", "ok")


def as_number(value: object) -> int | float | None:
    """A metric's value if it is a number (inf and nan included), else None."""
    return value if isinstance(value, (int, float)) else None


class Figure(NamedTuple):
    """A metric of a cell over its repeats, in the unit of its Kind.

    value: the median over repeats where measured; the largest where counted or predicted (repeats should be equal).
        A repeat that diverged is no noise that a median may hide: NaN where any repeat is NaN, and otherwise, of a
        measured metric, the infinity that is the worse one for it where any repeat has that.
    low, high: the spread over repeats and measured steps (quartiles where the metric has them), without what is NaN;
        None: not known.
    """

    value: int | float
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One cell of a run. records: the last record of each repeat, since a cell may have been run again (`--retry`)."""

    cell_id: str
    records: tuple[Record, ...]

    @cached_property
    def worst(self) -> Record:
        if len(self.records) == 1:
            return self.records[0]
        return min(self.records, key=lambda record: _WORST_FIRST.index(record.status))

    @property
    def status(self) -> Status:
        return self.worst.status

    @cached_property
    def label(self) -> str:
        return self.records[0].label

    @property
    def cell(self) -> dict[str, Any]:
        return self.records[-1].cell

    def metric(self, name: str) -> Metric | None:
        """The metric of the last repeat that ended ok and has it, absent or not; None where none has it.

        Where no repeat ended ok, all of them count.
        """
        if len(self.records) == 1:
            only: Metric | None = self.records[0].metrics.get(name)
            return only
        finished = [record for record in self.records if record.status == "ok"] or list(self.records)
        return next((r.metrics[name] for r in reversed(finished) if name in r.metrics), None)

    def figure(self, name: str) -> Figure | None:
        """The metric over all repeats; None where it is absent or not a number, or the cell's status is not ok."""
        if self.status != "ok":
            return None
        if len(self.records) == 1:
            # The usual case, without the lists below: reports on large runs take much of their time here.
            metrics = self.records[0].metrics
            if isinstance(metrics, StoredMetrics) and (plain := metrics.plain(name)):
                value, source, low, high = plain
                return None if value is None else Figure(value, source, low, high)
            metric = metrics.get(name)
            number = as_number(metric.value) if metric else None
            return Figure(number, metric.source, metric.min, metric.max) if metric and number is not None else None
        taken = [record.metrics[name] for record in self.records if name in record.metrics]
        numbers = [number for metric in taken if (number := as_number(metric.value)) is not None]
        if not numbers:
            return None
        source = next(metric.source for metric in taken if as_number(metric.value) is not None)
        spread = numbers if len(numbers) > 1 else []
        # Without NaN, of which the smallest and the largest would depend on the order of the repeats.
        lows = [low for low in (*(metric.min for metric in taken), *spread) if low is not None and low == low]
        highs = [high for high in (*(metric.max for metric in taken), *spread) if high is not None and high == high]
        value = _diverged(name, numbers, source)
        if value is None:
            value = median(numbers) if source == "measured" else max(numbers)
        return Figure(value, source, min(lows, default=None), max(highs, default=None))


def _diverged(name: str, numbers: list[int | float], source: str) -> float | None:
    """What stands for all repeats of a metric if one diverged (`Figure.value`); None where none did."""
    if any(number != number for number in numbers):
        return math.nan
    better = METRICS[name].better if name in METRICS else "neither"
    worst = {"lower": math.inf, "higher": -math.inf}.get(better)
    return worst if source == "measured" and worst in numbers else None


def names_of(outcome: Outcome) -> Collection[str]:
    """The names of the metrics that any repeat of a cell has, absent ones included."""
    if len(outcome.records) == 1:
        return outcome.records[0].metrics.keys()
    return {name for record in outcome.records for name in record.metrics}


def equal_numbers(first: Outcome, second: Outcome) -> dict[str, dict[str, Any]]:
    """Metrics of which both cells have the same number, with all that was recorded beside it: their JSON by name.

    This is for comparing large runs, most numbers of which are equal: it compares what was read, without making metrics
    of it. It may leave out equal numbers; cells of several repeats, or that did not end ok, have none here.
    """
    if len(first.records) > 1 or len(second.records) > 1 or first.status != "ok" or second.status != "ok":
        return {}
    before, after = first.records[0].metrics, second.records[0].metrics
    if not isinstance(before, StoredMetrics) or not isinstance(after, StoredMetrics):
        return {}
    stored = after.content
    if before.content == stored:
        return {name: content for name, content in stored.items() if type(content["value"]) in _NUMBERS}
    return {
        name: content
        for name, content in before.content.items()
        if type(content["value"]) in _NUMBERS and content == stored.get(name)
    }


_NUMBERS = frozenset((int, float))


def outcomes(run: Run) -> list[Outcome]:
    """The cells of a run in the order in which they were first written."""
    return collect(run.records)


def collect(records: Iterable[Record]) -> list[Outcome]:
    """As `outcomes`, for records without a run folder."""
    cells: dict[str, dict[int, Record]] = {}
    for record in records:
        cells.setdefault(record.cell_id, {})[record.repeat] = record
    return [Outcome(cell_id, tuple(repeats.values())) for cell_id, repeats in cells.items()]


def said(value: float, unit: str, exact: bool = False) -> str:
    """A number with its unit, as text for people: "412.0 MiB", "12.3 ms", "8,320 tokens/s", "0.14".

    exact: every digit (bytes in full), for two numbers that look alike when rounded.
    """
    if value != value or value in (float("inf"), float("-inf")):
        return {"inf": "inf", "-inf": "-inf"}.get(str(value), "nan")
    if unit == "byte":
        return f"{value:,.0f} B" if exact else format_bytes(value)
    if unit == "second":
        return f"{value!r} s" if exact else (f"{value * 1000:,.3g} ms" if value < 1 else f"{value:,.2f} s")
    if exact:
        return f"{value!r}"
    if unit in ("token/second", "sample/second"):
        return f"{value:,.0f} {unit.split('/')[0]}s/s" if value >= 100 else f"{value:.3g} {unit.split('/')[0]}s/s"
    if unit == "count" or (isinstance(value, int) and abs(value) < 10**15):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def said_apart(first: float, second: float, unit: str) -> tuple[str, str]:
    """Two numbers as `said` writes them, with every digit where rounding would make different ones look equal."""
    exact = first != second and said(first, unit) == said(second, unit)
    return said(first, unit, exact), said(second, unit, exact)
