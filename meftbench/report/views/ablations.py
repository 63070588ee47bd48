"""Plots of how one setting of a method changes its score after training, all else being equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.labels import joined
from meftbench.report.figures.plots import legend_beside
from meftbench.report.figures.side_bits import SWEEP
from meftbench.report.views.scores import Result, results
from meftbench.units import MiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# The settings that are plotted one at a time, and the label of their axis.
AXES = {
    "side_bits": "side bits m (the factor is 1/2^m)",
    "adapter_size": "adapter dimension r",
    "reversible_layers": "reversible layers (the rest: ordinary, with the same adapters)",
}
Draw = Callable[["DataFrame", "Axes"], None]
_COLOURS = ("#004D38", "#B34700", "#0072B2", "#CC79A7")


def draws_for(axis: str) -> list[Draw]:
    """The plots of an axis, one above the other: the score and, for reversible layers, the activation memory."""

    def score(frame: DataFrame, ax: Axes) -> None:
        """Score against the setting, a line for cells that differ in it alone; bars: standard deviations over seeds."""
        _plot(frame, ax, axis, lambda r: r.score.mean, lambda r: r.score.deviation or 0.0, _score_label(frame))

    def memory(frame: DataFrame, ax: Axes) -> None:
        """Activation memory of a step against the setting, on an axis from zero."""
        _plot(frame, ax, axis, lambda r: (r.activation_bytes or 0) / MiB, lambda r: 0.0, "activation memory (MiB)")
        ax.set_ylim(0)

    return [score, memory] if axis == "reversible_layers" else [score]


def sweeps(frame: DataFrame, axis: str) -> list[list[Result]]:
    """Results of one task and method that differ in `axis` alone, ordered by it; only lines of two or more values."""
    results_by_line: dict[str, list[Result]] = {}
    for result in results(frame):
        settings = json.loads(result.first["settings"])
        if settings.get(axis) is None and axis != "side_bits":
            continue
        if _place(result, axis) is None or result.own:
            continue
        fixed = {name: value for name, value in settings.items() if name not in (axis, "side_bits")}
        if axis != "side_bits":
            fixed["side_bits"] = result.first["side_bits"]
        key = json.dumps([result.first["task"], result.first["method_name"], result.first["levers"], fixed])
        results_by_line.setdefault(key, []).append(result)
    lines = [sorted(line, key=lambda r: float(_place(r, axis) or 0)) for line in results_by_line.values()]
    return [line for line in lines if len({_place(r, axis) for r in line}) > 1]


def _place(result: Result, axis: str) -> float | None:
    """The position of a result on the axis; the setting "all" is the number of layers of the model."""
    value: Any = result.first["side_bits"] if axis == "side_bits" else json.loads(result.first["settings"]).get(axis)
    place = result.first["layers"] if value == "all" else value
    return None if place is None else float(place)


def _plot(
    frame: DataFrame,
    ax: Axes,
    axis: str,
    value: Callable[[Result], float],
    spread: Callable[[Result], float],
    label: str,
) -> None:
    lines = sweeps(frame, axis)
    for line, shade in zip(lines, _COLOURS * len(lines), strict=False):
        xs = [place for r in line if (place := _place(r, axis)) is not None]
        ax.errorbar(xs, [value(r) for r in line], yerr=[spread(r) for r in line], color=shade, marker="o", capsize=3,
                    label=_label_without(line[0], axis))  # fmt: skip
    places = sorted({place for line in lines for r in line if (place := _place(r, axis)) is not None})
    if axis == "adapter_size":
        ax.set_xscale("log", base=2)
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.minorticks_off()
    ax.set(xlabel=AXES[axis], ylabel=label)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)


def _label_without(result: Result, axis: str) -> str:
    """The method's label without the setting that is plotted."""
    method, *levers = result.first["parts"]
    return joined([method.without(axis), *levers])


def _score_label(frame: DataFrame) -> str:
    first = next(iter(results(frame)), None)
    return f"{first.first['scored_by'] if first else 'score'} on validation"


# The settings that move the starting point. The factors lambda and beta may be set instead of the side bits.
_STARTING_POINT_SETTINGS = ("coupling", "output", "side_bits", "lambda", "beta")


def shifted(frame: DataFrame) -> list[Result]:
    """Results of reversible methods that differ from others of the same method in their starting point alone.

    Of each method, those at the combination of other settings and levers that has the most such results.
    """
    by_method: dict[str, dict[str, list[Result]]] = {}
    for result in results(frame):
        row = result.first
        if row["coupling"] and row["starting_point_shift"] is not None and not result.own:
            other_settings = {
                name: value
                for name, value in json.loads(row["settings"]).items()
                if name not in _STARTING_POINT_SETTINGS
            }
            by_settings = by_method.setdefault(str(row["method_name"]), {})
            by_settings.setdefault(json.dumps([row["levers"], other_settings]), []).append(result)
    largest = [max(by_settings.values(), key=len) for by_settings in by_method.values()]
    return [r for line in largest if len({r.first["starting_point_shift"] for r in line}) > 1 for r in line]


def plot_score_by_shift(frame: DataFrame, ax: Axes) -> None:
    """Score after training against the starting-point shift before it, a point per reversible method and setting.

    Colour and marker stand for coupling and output; the number beside a point is its factor 1/2^m, where
    side bits m are known.
    """
    labelled: set[str] = set()
    for result in shifted(frame):
        row = result.first
        shade, marker, _ = SWEEP[row["coupling"], row["output"]]
        label = f"{row['method_name']}, {row['coupling']}, {row['output']}"
        ax.errorbar([row["starting_point_shift"]], [result.score.mean], yerr=[result.score.deviation or 0.0],
                    color=shade, marker=marker, markersize=7, capsize=3, linestyle="none",
                    label=label if label not in labelled else "_again")  # fmt: skip
        labelled.add(label)
        if row["side_bits"] is not None:
            ax.annotate(f"1/{2 ** row['side_bits']}", (row["starting_point_shift"], result.score.mean), fontsize=7,
                        xytext=(6, 4), textcoords="offset points")  # fmt: skip
    ax.set(xlabel="starting-point shift, before training", ylabel=_score_label(frame))
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)
