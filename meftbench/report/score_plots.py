"""Plots of trainings: score beside memory and time, and how it was reached. Frame in, axes drawn, nothing saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from meftbench.report.plots import colour, legend_beside, markers
from meftbench.report.scores import Result, results
from meftbench.report.tables import methods_in_order
from meftbench.units import MiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_DOMINATED = 0.35  # opacity of what another method beats in both


def plot_score_by_memory(frame: DataFrame, ax: Axes) -> None:
    """Score against activation memory (MiB) of one task: a point a method with its best rate, a bar over its seeds.

    The line joins the methods that no other beats in both; the others are paler.
    """
    _plot_score(frame, ax, _mebibytes, "activation memory of a step (MiB)")


def plot_score_by_time(frame: DataFrame, ax: Axes) -> None:
    """As `plot_score_by_memory`, against the time of all training steps (s)."""
    _plot_score(frame, ax, _seconds, "time of all training steps (s)")


def _seconds(result: Result) -> float | None:
    return result.time_s.mean if result.time_s.values else None


def _mebibytes(result: Result) -> float | None:
    return None if result.activation_bytes is None else result.activation_bytes / MiB


def _plot_score(frame: DataFrame, ax: Axes, cost: Callable[[Result], float | None], label: str) -> None:
    looks = markers(frame)
    finite = [result for result in results(frame) if math.isfinite(result.score.mean)]
    points = [(x, result) for result in finite if (x := cost(result)) is not None]
    best = [
        (x, result)
        for x, result in points
        if not any(y <= x and other.score.mean >= result.score.mean and other is not result for y, other in points)
    ]
    for x, result in points:
        alone = any(result is other for _, other in best)
        method, about = result.first["method"], result.score.deviation or 0.0
        ax.errorbar([x], [result.score.mean], yerr=[about], color=colour(method), marker=looks[method], markersize=7,
                    markerfacecolor="white" if result.own else colour(method), capsize=3, linestyle="none",
                    alpha=1.0 if alone else _DOMINATED, label=result.method)  # fmt: skip
    best.sort(key=lambda pair: pair[0])
    ax.plot([x for x, _ in best], [r.score.mean for _, r in best], color="#999999", linewidth=0.8, zorder=0)
    scored = points[0][1].first["scored_by"] if points else "score"
    ax.set(xlabel=label, ylabel=f"{scored} on validation", xscale="log")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    _plain_ticks(ax)
    legend_beside(ax)


def _plain_ticks(ax: Axes) -> None:
    """Numbers as people write them on a log axis that often spans less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

    low, high = ax.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Apart by about the same factor: over several decades fewer of each, within one octave or so as on a linear axis.
    steps = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5) if high < 120 * low else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    near = high < 3 * low or len(ticks) < 3
    locator: Locator = MaxNLocator(nbins=6, min_n_ticks=3) if near else FixedLocator(ticks)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def plot_learning_curves(frame: DataFrame, ax: Axes) -> None:
    """Validation score against optimizer steps of one task: a line a method with its best rate, a band over seeds."""
    import numpy as np

    found = {result.method: result for result in results(frame)}
    order = methods_in_order(frame)
    for result in sorted(found.values(), key=lambda r: order.index(r.first["method"])):
        curves = [row["learning_curve"] for row in result.rows if row["learning_curve"]]
        # Early stopping ends seeds at different steps: each step has the seeds that reached it.
        known = [(int(step), score) for curve in curves for step, _, score in curve if score is not None]
        steps = sorted({step for step, _ in known})
        at = [[score for step, score in known if step == wanted] for wanted in steps]
        mean = np.array([np.mean(scores) for scores in at])
        line = colour(result.first["method"])
        ax.plot(steps, mean, color=line, marker=".", linestyle="--" if result.own else "-", label=result.method)
        if len(curves) > 1:
            ax.fill_between(steps, [min(s) for s in at], [max(s) for s in at], color=line, alpha=0.12, linewidth=0)
    scored = next((result.first["scored_by"] for result in found.values()), "score")
    ax.set(xlabel="optimizer steps", ylabel=f"{scored} on validation")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)
