"""A change: one metric of one cell in two runs, with the judgement on it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from meftbench.catalogue.metrics import METRICS
from meftbench.escapes import single_line
from meftbench.records.outcome import said, said_apart
from meftbench.verdicts.noise import Evidence

Judgement = Literal["worse", "better", "changed", "noise", "same"]
UNMOVED: frozenset[Judgement] = frozenset({"noise", "same"})  # nothing is known to have changed


_new = tuple.__new__


class Change(NamedTuple):
    """One metric of one cell in both runs; or the cell's status where it differs (metric "status", no numbers).

    evidence: what the samples of a measured time say; None where it was judged without them.
    missing: why the second run lacks the number that the first has (`after` is None); "" where it has it.
    """

    label: str
    cell_id: str
    metric: str
    judgement: Judgement
    source: str = ""
    before: int | float | None = None
    after: int | float | None = None
    statuses: tuple[str, str] | None = None
    evidence: Evidence | None = None
    missing: str = ""

    @staticmethod
    def of_equal(label: str, cell_id: str, metric: str, source: str, value: int | float) -> Change:
        """A number that both runs have: as the constructor makes it, in half the time, since most numbers are such."""
        return _new(Change, (label, cell_id, metric, "same", source, value, value, None, None, ""))

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
        evidence = f"; {self.evidence.text()}" if self.evidence else ""
        return single_line(f"{self.judgement}: {self.label}: {self.metric} {self.numbers()}{evidence}")

    def numbers(self) -> str:
        """The two values with their source, and the change."""
        if self.statuses:
            return f"{self.statuses[0]} -> {self.statuses[1]}"
        if self.before is None:
            return ""
        unit = METRICS[self.metric].unit
        if self.after is None or self.delta is None:
            return f"{said(self.before, unit)} {self.source} -> missing in the second run ({self.missing})"
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
