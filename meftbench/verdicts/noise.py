"""Whether two sets of measured times differ by more than their noise.

A change is claimed only where both hold: a two-sided Mann-Whitney U test gives p below 5 %, and the 95 % bootstrap
interval of the ratio of medians lies outside the threshold. The steps of one process are not independent of each other,
so the test alone would claim too much; the interval also has to clear the threshold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import comb
from typing import Any

from meftbench.records.outcome import Outcome, as_number

SIGNIFICANCE = 0.05
_RESAMPLES = 1000
_CELLS_AT_ONCE = 500  # of the bootstrap: 500 cells × 1,000 resamples × 20 samples are 80 MB
INSTALL = "pip install 'meftbench[compare]'"


@dataclass(frozen=True)
class Evidence:
    """What two sets of samples say about the ratio of their medians, after to before.

    n: how many samples before and after.  p: two-sided, of the Mann-Whitney U test.
    low, high: bounds of the 95 % bootstrap interval of the ratio of medians.
    """

    n: tuple[int, int]
    p: float
    low: float
    high: float

    @property
    def enough(self) -> bool:
        """Whether so many samples could give a p below `SIGNIFICANCE` at all: 4 and 4 can, 3 and 3 cannot."""
        return 2 / comb(sum(self.n), self.n[0]) < SIGNIFICANCE

    def shows_change(self, tolerance: float, rise: bool) -> bool:
        """Whether the later median is higher (`rise`), or lower, by more than `tolerance`, a share of the earlier one.

        Samples that show the opposite show no such change: the value of a cell of several repeats is the median of
        theirs, which may have risen where the median of all samples fell.
        """
        return self.p < SIGNIFICANCE and (self.low > 1 + tolerance if rise else self.high < 1 - tolerance)

    def inverted(self) -> Evidence:
        """The evidence about the reciprocal: about a speed, from that about the time it is computed from."""
        low, high = (1 / bound if bound else float("inf") for bound in (self.high, self.low))
        return Evidence(self.n, self.p, low, high)

    def text(self) -> str:
        """`n 5 and 5, p 0.008, ratio of medians 1.030 to 1.061 (95 %)`."""
        few = "" if self.enough else "; too few samples to show a change"
        ratio = f"ratio of medians {self.low:.3f} to {self.high:.3f} (95 %)"
        return f"n {self.n[0]} and {self.n[1]}, p {self.p:.2g}, {ratio}{few}"


def available() -> bool:
    """Whether scipy, which has the test, is installed in a version that has what is called here (1.15)."""
    try:
        major, minor = version("scipy").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (1, 15)


def samples_of(outcome: Outcome, metric: str) -> list[float]:
    """All samples of a metric over the repeats of a cell, in the metric's unit; empty where records have none."""
    taken = [record.metrics[metric].samples or [] for record in outcome.records if metric in record.metrics]
    return [number for samples in taken for sample in samples if (number := as_number(sample)) is not None]


def evidences(pairs: Sequence[tuple[list[float], list[float]]]) -> list[Evidence]:
    """The evidence of each pair of samples (before, after), each of two finite, positive values or more.

    Pairs with as many samples are taken together, as arrays, since a call for each would take a millisecond a pair.
    The bootstrap begins with a fixed seed, so that the same samples always give the same interval.
    """
    if not pairs:
        return []
    import numpy as np

    by_size: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for index, (before, after) in enumerate(pairs):
        # With ties the exact distribution does not apply, and scipy decides on one method for a whole array.
        tied = len({*before, *after}) < len(before) + len(after)
        by_size[len(before), len(after), tied].append(index)
    results: dict[int, Evidence] = {}
    for (n_before, n_after, tied), all_indices in by_size.items():
        for start in range(0, len(all_indices), _CELLS_AT_ONCE):
            indices = all_indices[start : start + _CELLS_AT_ONCE]
            first, second = (np.array([pairs[index][side] for index in indices], dtype=float) for side in (0, 1))
            for index, p, low, high in zip(indices, *_test(first, second, tied), strict=True):
                results[index] = Evidence((n_before, n_after), float(p), float(low), float(high))
    return [results[index] for index in range(len(pairs))]


def _test(before: Any, after: Any, tied: bool) -> tuple[Any, Any, Any]:
    """p and the bounds of the interval for each row; before: (cells, n), after: (cells, m)."""
    import numpy as np
    from scipy import stats

    small = max(before.shape[-1], after.shape[-1]) <= 20
    method = "exact" if small and not tied else "asymptotic"
    p = stats.mannwhitneyu(after, before, axis=-1, alternative="two-sided", method=method).pvalue
    interval = stats.bootstrap(
        (after, before),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        n_resamples=_RESAMPLES,
        vectorized=True,
        axis=-1,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return p, interval.low, interval.high
