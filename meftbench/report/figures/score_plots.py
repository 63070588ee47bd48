"""Plots of training results: score against memory and time, and learning curves. Axes are drawn, nothing is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from meftbench.report.figures.plots import legend_beside
from meftbench.report.figures.style import colour, distinct_colours, markers
from meftbench.report.results import methods_in_order
from meftbench.report.views.scores import Result, results
from meftbench.units import MiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_DOMINATED = 0.35  # opacity of a method that another beats in both score and cost


def plot_score_by_memory(frame: DataFrame, ax: Axes) -> None:
    """Score against activation memory (MiB) of one task: a point per method at its best learning rate.

    Bars are standard deviations over seeds. The line joins the methods that score higher than every cheaper one by more
    than the larger of the two deviations; the others are paler.
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
    marker_of = markers(frame)
    finite = [result for result in results(frame) if math.isfinite(result.score.mean)]
    points = [(x, result) for result in finite if (x := cost(result)) is not None]
    frontier: list[tuple[float, Result]] = []
    for x, result in sorted(points, key=lambda pair: (pair[0], -pair[1].score.mean)):
        if not frontier or _is_above(result, frontier[-1][1]):
            frontier.append((x, result))
    for x, result in points:
        on_frontier = any(result is rival for _, rival in frontier)
        shade, marker = colour(result.first["method_name"]), marker_of[result.first["method"]]
        ax.errorbar([x], [result.score.mean], yerr=[result.score.deviation or 0.0], color=shade, marker=marker,
                    markersize=7, markerfacecolor="white" if result.own else shade, capsize=3,
                    linestyle="none", alpha=1.0 if on_frontier else _DOMINATED, label=result.method)  # fmt: skip
    ax.plot([x for x, _ in frontier], [r.score.mean for _, r in frontier], color="#999999", linewidth=0.8, zorder=0)
    scored = points[0][1].first["scored_by"] if points else "score"
    ax.set(xlabel=label, ylabel=f"{scored} on validation", xscale="log")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    _plain_ticks(ax)
    legend_beside(ax)


def _is_above(result: Result, other: Result) -> bool:
    """Whether a score is higher by more than chance: the larger of the deviations over seeds."""
    noise = max(result.score.deviation or 0.0, other.score.deviation or 0.0)
    return result.score.mean - other.score.mean > noise


def _plain_ticks(ax: Axes) -> None:
    """Numbers as people write them on a log axis that often spans less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

    low, high = ax.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Neighbours differ by about the same factor: over several decades a decade has fewer ticks; where the axis spans
    # less than a factor of 3, they are those of a linear axis.
    steps = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5) if high < 120 * low else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    near = high < 3 * low or len(ticks) < 3
    locator: Locator = MaxNLocator(nbins=6, min_n_ticks=3) if near else FixedLocator(ticks)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def plot_learning_curves(frame: DataFrame, ax: Axes) -> None:
    """Validation score against optimizer steps of one task: a line per method at its best learning rate.

    Bands go from the lowest to the highest of the seeds.
    """
    import numpy as np

    by_method = {result.method: result for result in results(frame)}
    order = methods_in_order(frame)
    shades = distinct_colours({result.method: result.first["method_name"] for result in by_method.values()})
    for result in sorted(by_method.values(), key=lambda r: order.index(r.first["method"])):
        curves = [row["learning_curve"] for row in result.rows if row["learning_curve"]]
        # Early stopping ends seeds at different steps: a step has the scores of the seeds that reached it.
        evaluations = [(int(step), score) for curve in curves for step, _, score in curve if score is not None]
        steps = sorted({step for step, _ in evaluations})
        scores_by_step = [[score for step, score in evaluations if step == evaluated] for evaluated in steps]
        mean = np.array([np.mean(scores) for scores in scores_by_step])
        shade = shades[result.method]
        ax.plot(steps, mean, color=shade, marker=".", linestyle="--" if result.own else "-", label=result.method)
        if len(curves) > 1:
            ax.fill_between(
                steps,
                [min(s) for s in scores_by_step],
                [max(s) for s in scores_by_step],
                color=shade,
                alpha=0.12,
                linewidth=0,
            )
    scored = next((result.first["scored_by"] for result in by_method.values()), "score")
    ax.set(xlabel="optimizer steps", ylabel=f"{scored} on validation")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)
