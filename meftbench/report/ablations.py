"""Plots of what one setting does to the score of a trained method, all else being equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meftbench.report.plots import legend_beside
from meftbench.report.scores import Result, results
from meftbench.report.side_bits import SWEEP
from meftbench.report.tables import parts_of
from meftbench.units import MiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# The settings that are looked at one by one, and what their axis is called.
AXES = {
    "side_bits": "side bits m (the factor is 1/2^m)",
    "adapter_size": "adapter dimension r",
    "reversible_layers": "reversible layers (the rest: ordinary, with the same adapters)",
}
Draw = Callable[["DataFrame", "Axes"], None]
_COLOURS = ("#004D38", "#B34700", "#0072B2", "#CC79A7")


def draws_for(axis: str) -> list[Draw]:
    """What is drawn of an axis, one above the other: the score; of reversible layers the memory as well."""

    def score(frame: DataFrame, ax: Axes) -> None:
        """Score against the setting, a line for cells that are alike but for it; bars are deviations over seeds."""
        _plot(frame, ax, axis, lambda r: r.score.mean, lambda r: r.score.deviation or 0.0, _scored(frame))

    def memory(frame: DataFrame, ax: Axes) -> None:
        """Activation memory of a step, from zero, against the setting."""
        _plot(frame, ax, axis, lambda r: (r.activation_bytes or 0) / MiB, lambda r: 0.0, "activation memory (MiB)")
        ax.set_ylim(0)

    return [score, memory] if axis == "reversible_layers" else [score]


def sweeps(frame: DataFrame, axis: str) -> list[list[Result]]:
    """Results of one task and method that differ in `axis` alone, in its order; lines of two at least."""
    found: dict[str, list[Result]] = {}
    for result in results(frame):
        settings = json.loads(result.first["settings"])
        if settings.get(axis) is None and axis != "side_bits":
            continue
        if _place(result, axis) is None or result.own:
            continue
        alike = {name: value for name, value in settings.items() if name not in (axis, "side_bits")}
        if axis != "side_bits":
            alike["side_bits"] = result.first["side_bits"]
        key = json.dumps([result.first["task"], result.first["method_name"], result.first["levers"], alike])
        found.setdefault(key, []).append(result)
    lines = [sorted(line, key=lambda r: float(_place(r, axis) or 0)) for line in found.values()]
    return [line for line in lines if len({_place(r, axis) for r in line}) > 1]


def _place(result: Result, axis: str) -> float | None:
    """Where a result stands on the axis; all layers are as many as the model has."""
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
                    label=_named(line[0], axis))  # fmt: skip
    places = sorted({place for line in lines for r in line if (place := _place(r, axis)) is not None})
    if axis == "adapter_size":
        ax.set_xscale("log", base=2)
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.minorticks_off()
    ax.set(xlabel=AXES[axis], ylabel=label)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)


def _named(result: Result, axis: str) -> str:
    """The method's label without the setting that is looked at."""
    name, settings, levers = parts_of(str(result.first["method"]))
    rest = [setting for setting in settings if not setting.startswith(f"{axis}=")]
    return "+".join([f"{name}({','.join(rest)})" if rest else name, *levers])


def _scored(frame: DataFrame) -> str:
    first = next(iter(results(frame)), None)
    return f"{first.first['scored_by'] if first else 'score'} on validation"


# What moves the starting point; the factors themselves may be named instead of the side bits.
_MOVES = ("coupling", "output", "side_bits", "lambda", "beta")


def shifted(frame: DataFrame) -> list[Result]:
    """Results of reversible methods that differ, each from others of its method, in where they start alone.

    Of the settings that a method was run at otherwise, those with the most such results.
    """
    alike: dict[str, dict[str, list[Result]]] = {}
    for result in results(frame):
        row = result.first
        if row["coupling"] and row["starting_point_shift"] is not None and not result.own:
            rest = {name: value for name, value in json.loads(row["settings"]).items() if name not in _MOVES}
            of = alike.setdefault(str(row["method_name"]), {})
            of.setdefault(json.dumps([row["levers"], rest]), []).append(result)
    lines = [max(of.values(), key=len) for of in alike.values()]
    return [r for line in lines if len({r.first["starting_point_shift"] for r in line}) > 1 for r in line]


def plot_score_by_shift(frame: DataFrame, ax: Axes) -> None:
    """Score after training against the starting-point shift before it, a point a reversible method and setting.

    Colour and marker are coupling and output; the number beside a point is its factor near zero.
    """
    said: set[str] = set()
    for result in shifted(frame):
        row = result.first
        shade, marker, _ = SWEEP[row["coupling"], row["output"]]
        label = f"{row['method_name']}, {row['coupling']}, {row['output']}"
        ax.errorbar([row["starting_point_shift"]], [result.score.mean], yerr=[result.score.deviation or 0.0],
                    color=shade, marker=marker, markersize=7, capsize=3, linestyle="none",
                    label=label if label not in said else "_again")  # fmt: skip
        said.add(label)
        if row["side_bits"] is not None:
            ax.annotate(f"1/{2 ** row['side_bits']}", (row["starting_point_shift"], result.score.mean), fontsize=7,
                        xytext=(6, 4), textcoords="offset points")  # fmt: skip
    ax.set(xlabel="starting-point shift, before training", ylabel=_scored(frame))
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)
