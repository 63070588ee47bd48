"""Figures of predictions against GPU measurements: a scatter with its identity line, and the errors of each method.

The errors are those of `verdicts.validation`; a run has them where `meftbench validate --save` wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meftbench.records.store import Run
from meftbench.report.figures.picture import Picture
from meftbench.report.figures.plots import legend_beside, unit_of
from meftbench.report.figures.style import colour
from meftbench.units import format_bytes
from meftbench.verdicts.snapshot_validation import SnapshotValidation
from meftbench.verdicts.validation import METRICS, Error, Validation, saved, spreads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "peak_allocated_bytes": "peak allocated",
    "activation_peak_bytes": "activation peak",
    "peak_reserved_bytes": "peak reserved",
}
# Markers stand for precisions, since colours stand for methods.
_MARKERS = ("o", "s", "^", "D", "v", "P")


def validation_text(validation: Validation) -> str:
    """A table of the spreads, the worst cell of each metric, and the cells without a prediction."""
    errors = validation.errors
    rows = spreads(errors)
    width = max(len(row.name) for row in rows)
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows):
        of_metric = [error for error in errors if error.metric == metric]
        worst = max(of_metric, key=lambda error: abs(error.share))
        lines += [f"{metric}: predicted against measured", f"  {'':<{width + 10}} cells  median   worst  signed"]
        for row in (row for row in rows if row.metric == metric):
            kind = f"{'' if row.axis == 'all' else row.axis:<9} {row.name:<{width}}"
            lines.append(f"  {kind} {row.count:>5} {row.median:>7.2%} {row.worst:>7.2%} {row.signed:>+7.2%}")
        lines.append(f"  worst: {worst.label}: {worst.measured:,} measured, {worst.predicted:,} predicted bytes")
    return "\n".join(lines + [f"not predicted: {line}" for line in validation.missing])


def snapshot_validation_lines(found: SnapshotValidation) -> list[str]:
    """A predicted step beside a recorded one, every number with its unit and how it was obtained."""
    share = found.common / found.predicted if found.predicted else 0.0
    lines = [
        found.label,
        f"predicted by the rules of {found.device}, {found.rules}",
        f"  allocations in common  {found.common:,} of {found.predicted:,} predicted ({share:.1%}), "
        f"and of {found.recorded:,} in the snapshot: the same sizes in the same order",
        f"  peak above beginning   {format_bytes(found.recorded_above_bytes)} in the snapshot, "
        f"{format_bytes(found.predicted_above_bytes)} predicted, error {found.error:+.2%}",
    ]
    for title, rows in (("only in the snapshot", found.only_recorded), ("only predicted", found.only_predicted)):
        if rows:
            lines.append(f"{title}, the most bytes first")
        lines += [
            f"  {format_bytes(row.requested_bytes):>12}  {row.count} times{f', {row.origin}' if row.origin else ''}"
            for row in rows
        ]
    return lines


def validation_pictures(runs: Sequence[Run], names: Sequence[str]) -> list[Picture]:
    """A figure for each run that was validated. names: of the runs, in the titles where there are several."""
    validated = [(name, validation) for name, run in zip(names, runs, strict=True) if (validation := saved(run))]
    several = len(runs) > 1
    return [
        validation_picture(
            validation,
            f"predicted-against-measured-{index}" if several else "predicted-against-measured",
            f", {name}" if several else "",
        )
        for index, (name, validation) in enumerate(validated, start=1)
        if validation.errors
    ]


def validation_picture(validation: Validation, name: str = "predicted-against-measured", besides: str = "") -> Picture:
    """Above, predicted against measured bytes; below, the error of each method's cells; a column per metric."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [metric for metric in METRICS if any(error.metric == metric for error in validation.errors)]
    methods = list(dict.fromkeys(error.method for error in validation.errors))
    title = f"Predicted against measured: rules of {validation.profile}{besides}"
    size = (1.8 + 3.9 * len(shown), 4.9 + 0.2 * len(methods))
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(2, len(shown), height_ratios=[3.6, 0.8 + 0.2 * len(methods)])
        for column, metric in enumerate(shown):
            of_metric = [error for error in validation.errors if error.metric == metric]
            above, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
            plot_predicted_against_measured(of_metric, above)
            above.set_title(_NAMES[metric], loc="left")
            plot_errors_by_method(of_metric, below, methods)
            if column:
                above.set_ylabel("")
                below.tick_params(labelleft=False)
            if column == len(shown) - 1:
                legend_beside(above)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    worst = max(validation.errors, key=lambda error: abs(error.share))
    cells = len({error.label for error in validation.errors})
    alt = f"{title}, {cells} cells of {', '.join(methods)}; the largest error is {worst.share:+.1%}, of {worst.label}"
    return Picture(name, title, alt, lambda: figure)


def plot_predicted_against_measured(errors: Sequence[Error], ax: Axes) -> None:
    """Predicted bytes against measured ones, log-log, a point per cell; on the line both are the same.

    errors: of one metric. Colours are methods, markers precisions.
    """
    from matplotlib.ticker import LogLocator

    size, unit = unit_of([max(error.measured, error.predicted) for error in errors])
    precisions = list(dict.fromkeys(error.precision for error in errors))
    for method, name in dict.fromkeys((error.method, error.method_name) for error in errors):
        for precision in precisions:
            selected = [error for error in errors if (error.method, error.precision) == (method, precision)]
            if selected:
                ax.plot([error.measured / size for error in selected], [error.predicted / size for error in selected],
                        linestyle="none", marker=_MARKERS[precisions.index(precision) % len(_MARKERS)], markersize=5,
                        markerfacecolor="none", color=colour(name), label=f"{method}, {precision}")  # fmt: skip
    numbers = [number / size for error in errors for number in (error.measured, error.predicted)]
    low, high = min(numbers) / 1.3, max(numbers) * 1.3
    ax.plot([low, high], [low, high], color="#999999", linewidth=0.8, zorder=0, label="predicted = measured")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.set(xlabel=f"measured ({unit})", ylabel=f"predicted ({unit})")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axis.set_major_formatter("{x:,.10g}")
    ax.minorticks_off()
    ax.grid(True, which="major", color="#EEEEEE", linewidth=0.6)


def plot_errors_by_method(errors: Sequence[Error], ax: Axes, methods: Sequence[str]) -> None:
    """Predicted above measured, in percent, a line per method: a tick per cell, and a ring at the median.

    methods: from the top, whether or not they have a cell among `errors`.
    """
    from statistics import median

    for place, method in enumerate(methods):
        of_method = [error for error in errors if error.method == method]
        if of_method:
            shares, shade = [100 * error.share for error in of_method], colour(of_method[0].method_name)
            ax.plot(shares, [place] * len(shares), "|", color=shade, markersize=9, label=method)
            ax.plot([median(shares)], [place], "o", color=shade, fillstyle="none", markersize=7, label="_median")
    ax.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    widest = max([1.0, *(abs(100 * error.share) for error in errors)]) * 1.15
    ax.set_xlim(-widest, widest)
    ax.set_xlabel("predicted above measured (%)")
