"""The plots: each function draws a frame into axes; nothing is saved here. `figures.py` lays them out.

A frame is what `results.frame_of` makes, of one model and setting.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from meftbench.catalogue.labels import Part, joined
from meftbench.report.figures.style import CATEGORY, LINE, colour, markers
from meftbench.report.results import methods_in_order, parts_by_method, rows_of, wrong_gradient
from meftbench.units import GiB, MiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_DOMINATED = "#B8B8B8"
# Longer labels take several lines.
LABEL_WIDTH = 38
# The label of an error of exactly 0, which has no place of its own on a log axis.
EXACT = "0 (bit-identical)"
# In models of more layers one note names all layers that are not finite: a word over each would overlap.
_WORD_A_LAYER = 12


def plot_activation_by_length(frame: DataFrame, ax: Axes) -> None:
    """Activation memory against sequence length (tokens), log-log, a line per method; the line style is the source.

    frame: `method`, `sequence_length`, `status`, `activation_peak_bytes` and its source, at one batch size.
    The slope in the legend is the exponent of the fitted power: 1 is linear, 2 quadratic.
    """
    _plot_activation(frame, ax, "sequence_length", "sequence length (tokens)")


def plot_activation_by_batch(frame: DataFrame, ax: Axes) -> None:
    """As `plot_activation_by_length`, against batch size (samples), at one sequence length."""
    _plot_activation(frame, ax, "batch_size", "batch size (samples)")


def _plot_activation(frame: DataFrame, ax: Axes, axis: str, label: str) -> None:
    rows = sorted(rows_of(frame), key=lambda row: row[axis])
    marker_of, parts_of = markers(frame), parts_by_method(frame)
    size, unit = unit_of(row["activation_peak_bytes"] for row in rows)
    failed: dict[Any, int] = {}
    for method in methods_in_order(frame):
        parts = parts_of[method]
        shade = colour(parts[0].name)
        of_method = [row for row in rows if row["method"] == method]
        known = [row for row in of_method if finite(row["activation_peak_bytes"])]
        not_ok = [row for row in of_method if row["status"] != "ok"]
        ended = "".join(f", × {status}" for status in dict.fromkeys(row["status"] for row in not_ok))
        for source in sorted({row["activation_peak_bytes_source"] for row in known}):
            points = [
                (r[axis], r["activation_peak_bytes"]) for r in known if r["activation_peak_bytes_source"] == source
            ]
            xs, ys = [x for x, _ in points], [y / size for _, y in points]
            power = slope(points)
            source_text = f", slope {power:.2f} ({source})" if power is not None else f" ({source})"
            ax.plot(xs, ys, LINE[source], color=shade, marker=marker_of[method], markersize=5,
                    label=named(parts, source_text + ended))  # fmt: skip
        crosses: list[tuple[Any, float]] = []
        for row in not_ok:
            # Several at one place would hide each other, so they go below each other from the top, as in the legend.
            crosses.append((row[axis], 0.96 - 0.055 * failed.setdefault(row[axis], 0)))
            failed[row[axis]] += 1
        if crosses:
            # The label of a curve says how the other cells ended; without a curve the crosses have the label.
            label_of_crosses = "_crosses" if known else named(parts, f": {not_ok[0]['status']}")
            ax.plot([x for x, _ in crosses], [y for _, y in crosses], color=shade, marker="x", markersize=7,
                    markeredgewidth=2, linestyle="none", transform=ax.get_xaxis_transform(), label=label_of_crosses,
                    clip_on=False)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel=f"activation memory ({unit})")
    places = sorted({row[axis] for row in rows})
    ax.set_xticks(places, [str(place) for place in places])
    ax.minorticks_off()
    # Room above the curves for the crosses, so that they are not read as values.
    if failed:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** (0.12 + 0.06 * max(failed.values())))
    if len(places) == 1:
        ax.set_xlim(places[0] / 2, places[0] * 2)
    plain_numbers(ax)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)


def plot_breakdown(frame: DataFrame, ax: Axes) -> None:
    """What the peak consists of: a bar per method, its total at the end. frame: one cell per method, at one shape."""
    rows = {row["method"]: row for row in rows_of(frame)}
    order = methods_in_order(frame)
    size, unit = unit_of(row["peak_allocated_bytes"] for row in rows.values())
    starts = dict.fromkeys(order, 0.0)
    for name, shade in CATEGORY.items():
        parts = [rows[method].get(name) for method in order]
        widths = [float(part) / size if finite(part) else 0.0 for part in parts]
        if not any(widths):
            continue
        lefts = [starts[method] for method in order]
        ax.barh(order, widths, left=lefts, color=shade, edgecolor="white", linewidth=0.5, label=_category(name))
        starts = {method: starts[method] + width for method, width in zip(order, widths, strict=True)}
    largest = max(starts.values(), default=0.0)
    for place, method in enumerate(order):
        row = rows[method]
        whole = row["peak_allocated_bytes"]
        total = f"{starts[method]:,.1f}" if whole is None or finite(whole) else "not finite"
        text = total if row["status"] == "ok" else row["status"]
        ax.text(starts[method] + largest * 0.01, place, text, va="center", fontsize=8)
    known = sorted({row["peak_allocated_bytes_source"] for row in rows.values() if row["peak_allocated_bytes"]})
    ax.set(xlabel=f"memory at the peak of a step ({unit}, {' and '.join(known) or 'none measured'})")
    ax.set_xlim(0, largest * 1.25 or 1)
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.set_yticks(range(len(order)), [named(rows[method]["parts"]) for method in order], fontsize=8)
    # The bar of a single method would otherwise fill the panel.
    ax.set_ylim(max(len(order), 4) - 0.5, -0.5)
    legend_beside(ax)


def plot_reconstruction(frame: DataFrame, ax: Axes) -> None:
    """Relative reconstruction error per layer, log axis, a line per method and stream (second stream hollow).

    frame: one cell per method, with `reconstruction_rel` = [[first stream, second stream] per layer].
    Exactly 0 is drawn on a line of its own at the bottom; methods that are 0 everywhere hide each other there, so the
    legend says it of them. inf and nan are triangles at the top, with a note, and are counted in the legend.
    """
    marker_of = markers(frame)
    rows = {row["method"]: row for row in rows_of(frame) if row.get("reconstruction_rel")}
    values = [float(value) for row in rows.values() for layer in row["reconstruction_rel"] for value in layer]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    low, high = (min(positive), max(positive)) if positive else (1e-16, 1e-15)
    floor, ceiling = low / 30, min(high, 1e200) * 30
    beyond: dict[int, set[str]] = {}
    off_scale: dict[tuple[str, int], None] = {}
    for method in methods_in_order(frame):
        if method not in rows:
            continue
        layers, shade = rows[method]["reconstruction_rel"], colour(rows[method]["method_name"])
        for stream in range(max(len(layer) for layer in layers)):
            errors = [float(layer[stream]) for layer in layers]
            drawn = [
                floor if error == 0 else min(error, ceiling) if math.isfinite(error) else ceiling for error in errors
            ]
            not_finite = sum(not all(map(math.isfinite, layer)) for layer in layers)
            exact = f": {EXACT}" if not any(error for layer in layers for error in layer) else ""
            exact += f", not finite in {not_finite} layer{'s' * (not_finite != 1)}" if not_finite else ""
            legend_text = named(rows[method]["parts"], f" ({rows[method]['reconstruction_rel_source']}){exact}")
            label = legend_text if stream == 0 else "_second stream"
            ax.plot(range(len(drawn)), drawn, "-" if stream == 0 else ":", color=shade, label=label,
                    marker=marker_of[method], markersize=5,
                    markerfacecolor=shade if stream == 0 else "white")  # fmt: skip
            for layer, error in enumerate(errors):
                if not math.isfinite(error):
                    off_scale[method, layer] = None
                    beyond.setdefault(layer, set()).add("nan" if math.isnan(error) else "inf")
    depth = max((len(row["reconstruction_rel"]) for row in rows.values()), default=1)
    runs = _runs(beyond)
    if depth <= _WORD_A_LAYER:
        notes = [((first + last) / 2, "center", words) for first, last, words in runs]
    else:
        of_runs = [f"{words}: layers {first} to {last}" if last > first else f"{words}: layer {first}"
                   for first, last, words in runs]  # fmt: skip
        notes = [(runs[0][0] - 0.4, "left", "; ".join(of_runs))] if runs else []
    for place, side, text in notes:
        ax.annotate(text, (place, ceiling), xytext=(0, 6), textcoords="offset points", ha=side,
                    fontsize=8, fontweight="bold")  # fmt: skip
    for method, layer in off_scale:
        ax.plot([layer], [ceiling], marker="^", markersize=8, linestyle="none", label="_off scale",
                color=colour(rows[method]["method_name"]), markeredgecolor="black", markeredgewidth=0.6)  # fmt: skip
    ax.set(yscale="log", xlabel="layer (0: nearest the input)", ylabel="relative reconstruction error")
    # The same room for a note above the top, however many powers of ten there are below it.
    ax.set_ylim(floor / 3, ceiling * max(6.0, (ceiling / floor) ** 0.08))
    # Room at the sides for the words above the outermost layers.
    ax.set_xlim(-0.45, depth - 0.55)
    step = max(1, math.ceil(depth / 12))
    ax.set_xticks(range(0, depth, step))
    if 0.0 in values:
        ax.axhline(floor, color="#999999", linewidth=0.8)
        powers = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        powers = powers[:: max(1, len(powers) // 8)] if positive else []
        ax.set_yticks([floor, *powers], [EXACT, *(f"1e{round(math.log10(power)):d}" for power in powers)])
        ax.minorticks_off()
    ax.grid(True, axis="y", which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax, title="filled: first stream, hollow: second")


def _runs(words_by_layer: dict[int, set[str]]) -> list[tuple[int, int, str]]:
    """Groups of neighbouring layers with the same words, as (first layer, last layer, words)."""
    runs: list[tuple[int, int, str]] = []
    for layer in sorted(words_by_layer):
        words = ", ".join(sorted(words_by_layer[layer]))
        if runs and runs[-1][1:] == (layer - 1, words):
            runs[-1] = (runs[-1][0], layer, words)
        else:
            runs.append((layer, layer, words))
    return runs


def plot_memory_against_speed(frame: DataFrame, ax: Axes) -> None:
    """Tokens/s against peak memory, a point per method.

    Grey: another method is no larger and no slower, and better in one. Grey and hollow: its gradient is wrong, so it
    is not compared with the others. frame: one cell per method, at one shape and setting.
    """
    marker_of = markers(frame)
    rows = [row for row in rows_of(frame) if finite(row["peak_allocated_bytes"]) and finite(row["tokens_per_s"])]
    size, unit = unit_of(row["peak_allocated_bytes"] for row in rows)
    notes = frontier(rows)
    for row, note in zip(rows, notes, strict=True):
        shade = _DOMINATED if note else colour(row["method_name"])
        inside = "none" if wrong_gradient(row) else shade
        ax.plot([row["peak_allocated_bytes"] / size], [row["tokens_per_s"]], marker=marker_of[row["method"]],
                linestyle="none", color=shade, markerfacecolor=inside, markersize=8)  # fmt: skip
    memory = " and ".join(sorted({row["peak_allocated_bytes_source"] for row in rows})) or "none"
    speed = " and ".join(sorted({row["tokens_per_s_source"] for row in rows})) or "none"
    ax.set(xlabel=f"peak allocated ({unit}, {memory})", ylabel=f"tokens/s ({speed})")
    ax.margins(0.12)
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    points = [(row["peak_allocated_bytes"] / size, row["tokens_per_s"]) for row in rows]
    names = [named(row["parts"], f" ({note})" if note else "") for row, note in zip(rows, notes, strict=True)]
    _label_beside(ax, points, names, [bool(note) for note in notes])


# --- what the plots share ---


def slope(points: Iterable[tuple[float, float]]) -> float | None:
    """Power p of the least-squares fit y = c·xᵖ; None with fewer than two different x; only positive x and y count."""
    known = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in known}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(known) for values in zip(*known, strict=True))
    across = sum((x - mean_x) * (y - mean_y) for x, y in known)
    return float(across / sum((x - mean_x) ** 2 for x, _ in known))


def frontier(rows: list[dict[str, Any]]) -> list[str]:
    """For each row "" where it is on the frontier of memory and speed, else the reason why not.

    It is dominated, or its gradient is wrong; in the latter case it dominates no other row.
    """
    reasons = [wrong_gradient(row) or "" for row in rows]
    valid = [index for index, reason in enumerate(reasons) if not reason]
    beaten = dominated([(rows[index]["peak_allocated_bytes"], rows[index]["tokens_per_s"]) for index in valid])
    for index, is_dominated in zip(valid, beaten, strict=True):
        reasons[index] = "dominated" if is_dominated else ""
    return reasons


def dominated(points: list[tuple[float, float]]) -> list[bool]:
    """For each (memory, speed): whether another has no more memory and no less speed, and is better in one."""
    return [
        any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in points) for memory, speed in points
    ]


def named(parts: Sequence[Part], besides: str = "") -> str:
    """The legend text of a method and its levers, with `besides` behind it; what is long goes below, so that the axes
    stay wide."""
    label = joined(parts)
    if len(label) + len(besides) <= LABEL_WIDTH:
        return label + besides
    method, *levers = parts
    lines = [method.name]
    for lever in [part.label for part in levers]:
        if len(lines[-1]) + len(lever) < LABEL_WIDTH:
            lines[-1] += f"+{lever}"
        else:
            lines.append(f"  +{lever}")
    lines[-1] += besides
    below = textwrap.wrap(", ".join(method.texts()), LABEL_WIDTH, break_long_words=False)
    return "\n".join([*lines, *(f"  {line}" for line in below)])


def height_of_labels(frame: DataFrame) -> float:
    """Inches that a figure needs for its methods: a bar or legend line each, and more where labels are long."""
    parts_of = parts_by_method(frame)
    return sum(0.24 + 0.13 * named(parts_of[m], " (dominated)").count("\n") for m in methods_in_order(frame))


def finite(value: float | None) -> TypeGuard[float]:
    """Whether a metric was taken and is finite, and so has a place on an axis; the tables show the others."""
    return value is not None and math.isfinite(value)


def unit_of(values: Iterable[float | None]) -> tuple[int, str]:
    largest = max((value for value in values if finite(value)), default=0)
    return (GiB, "GiB") if largest >= 10 * GiB else (MiB, "MiB")


def _category(name: str) -> str:
    words = name.removesuffix("_bytes")
    return "optimizer state" if words == "optimizer" else words


def plain_numbers(ax: Axes) -> None:
    """Label a log y axis 0.1, 10, 1,000 rather than by powers of ten, with ticks even within less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = ax.get_ylim()
    subs = (1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def legend_beside(ax: Axes, title: str | None = None, labels: dict[str, Any] | None = None) -> None:
    """Draw a legend right of the axes. labels: label to its artist; None: the labelled artists of the axes."""
    handles, texts = ax.get_legend_handles_labels()
    if labels is not None:
        handles, texts = list(labels.values()), list(labels)
    if handles:
        ax.legend(handles, texts, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8, title=title,
                  title_fontsize=8, alignment="left", borderaxespad=0.0, handlelength=3.0)  # fmt: skip


def _label_beside(ax: Axes, points: list[tuple[float, float]], names: list[str], dim: list[bool]) -> None:
    """Write names in a column right of the axes, each with a line to its point; those in `dim` are grey.

    Labels at the points themselves collide as soon as two methods cost about the same.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][1], -points[index][0]))
    lines = [names[index].count("\n") + 1 for index in order]
    # As a share of the axes' height. With many labels the share is smaller, but then the figure is higher.
    line = min(0.058, 0.96 / max(1, sum(lines)))
    apart = [line * (below + above) / 2 for below, above in pairwise(lines)]
    low, high = ax.get_ylim()
    heights: list[float] = []
    for place, index in enumerate(order):
        own_height = (points[index][1] - low) / (high - low) if high > low else 0.5
        heights.append(max(own_height, heights[-1] + apart[place - 1]) if heights else own_height)
    # Labels above the top are moved down, and push those below them down.
    for place in reversed(range(len(heights))):
        ceiling = heights[place + 1] - apart[place] if place + 1 < len(heights) else 0.98
        heights[place] = min(heights[place], ceiling)
    for index, height in zip(order, heights, strict=True):
        ax.annotate(names[index], points[index], xytext=(1.04, height), textcoords="axes fraction", va="center",
                    fontsize=8, annotation_clip=False,
                    color="#777777" if dim[index] else "black",
                    arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.6,
                                "relpos": (0.0, 0.5)})  # fmt: skip
