"""Changes of one cell that have one cause, told as one: the same bytes in several metrics, a time and its speeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from meftbench.catalogue.metrics import METRICS
from meftbench.escapes import single_line
from meftbench.records.outcome import said
from meftbench.verdicts.change import UNMOVED, Change

# The metric that leads a group: the first of these that is in it, else the one that changed by the largest share.
_LEADING = ("peak_allocated_bytes", "activation_peak_bytes", "step_time_s", "tokens_per_s", "samples_per_s")
_OF_STEP = frozenset({"step_time_s", "tokens_per_s", "samples_per_s"})  # computed from the same times
_NAMED = 2  # metrics that a line names beside the leading one; of more it says how many


class Told(NamedTuple):
    """A change, and the metrics of the same cell that changed for the same reason (`also`, in the order of METRICS)."""

    change: Change
    also: tuple[str, ...] = ()

    def text(self) -> str:
        """`worse: LABEL: metric ... (+64.0 KiB, +0.06%), and 5 metrics by the same 64.0 KiB`, on one line."""
        return single_line(f"{self.change.text()}{self._rest()}")

    def numbers(self) -> str:
        """The same without judgement, label and metric."""
        evidence = f"; {self.change.evidence.text()}" if self.change.evidence else ""
        return f"{self.change.numbers()}{evidence}{self._rest()}"

    def _rest(self) -> str:
        if not self.also:
            return ""
        many = f"{len(self.also)} metrics" if len(self.also) > _NAMED else ", ".join(self.also)
        if self.change.missing or self.change.metric in _OF_STEP:
            return f", and {many} likewise"
        return f", and {many} by the same {said(abs(self.change.delta or 0), 'byte')}"


def told(changes: Iterable[Change]) -> list[Told]:
    """The changes that are neither noise nor "same", those of one cell and cause as one; in the order of what leads.

    One cause have numbers that the second run lacks for one reason, bytes of one source that changed by the same number
    in one direction, and the time of a step with the speeds computed from it, where they are judged alike.
    """
    groups: dict[tuple[object, ...], list[Change]] = {}
    moved = [change for change in changes if change.judgement not in UNMOVED]
    for change in moved:
        groups.setdefault(_cause(change), []).append(change)
    leading: dict[int, Told] = {}
    for group in groups.values():
        by_metric = {change.metric: change for change in group}
        lead = next((by_metric[name] for name in _LEADING if name in by_metric), group[0])
        leading[id(lead)] = Told(lead, tuple(name for name in METRICS if name in by_metric and name != lead.metric))
    return [leading[id(change)] for change in moved if id(change) in leading]


def _cause(change: Change) -> tuple[object, ...]:
    """What changes with one cause have in common."""
    of_cell = (change.cell_id, change.judgement, change.source)
    if change.missing:
        return (*of_cell, "missing", change.missing)
    if change.metric in _OF_STEP:
        return (*of_cell, "step")
    in_bytes = change.delta is not None and METRICS[change.metric].unit == "byte"
    if in_bytes and math.isfinite(change.delta or 0):
        return (*of_cell, "bytes", change.delta)
    return (*of_cell, change.metric)
