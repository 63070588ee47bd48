"""Plots against the side bits of exact reversal: what they improve and what they cost. They use parts of `plots.py`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meftbench.report.figures.plots import LABEL_WIDTH, legend_beside, named, plain_numbers, unit_of
from meftbench.report.figures.style import LINE, SETTING_MARKERS
from meftbench.report.results import rows_of, without_side_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# Colour, marker and its size by coupling and output: the hue stands for the coupling, dark or light for the output.
# Markers drawn later are smaller, since lines of equal memory lie on each other.
SWEEP = {
    ("paper", "mean"): ("#0072B2", "o", 11.0),
    ("paper", "last"): ("#56B4E9", "s", 8.5),
    ("centred", "mean"): ("#B34700", "^", 6.0),
    ("centred", "last"): ("#E69F00", "D", 3.0),
}
_REFERENCE = (("#000000", (6, 3)), ("#7F7F7F", (3, 2)))


def plot_shift_by_side_bits(frame: DataFrame, ax: Axes) -> None:
    """Starting-point shift against side bits m, a line per coupling and output; other methods are dashed.

    frame: cells of one exact method with different `side_bits`, at one shape and setting, and the methods to compare
    it with, whose `side_bits` are None; each with `starting_point_shift` and its source.
    """
    _plot_by_side_bits(frame, ax, "starting_point_shift", 1, "starting-point shift ({})")
    values = [v for v in (row["starting_point_shift"] or 0 for row in rows_of(frame)) if 0 < v < math.inf]
    if not values:
        return
    ax.set_yscale("log")
    room = max(1.5, (max(values) / min(values)) ** 0.1)
    ax.set_ylim(min(values) / room, max(values) * room)
    plain_numbers(ax)
    zeros = [row["method"] for row in rows_of(frame) if row["starting_point_shift"] == 0]
    if zeros:
        # A logarithmic axis has no zero. A note says so, since a missing line would read as a number not taken.
        ax.text(0.01, 0.02, f"exactly 0, below the axis: {', '.join(zeros)}", transform=ax.transAxes, fontsize=8,
                va="bottom", color="#555555")  # fmt: skip
        ax.set_ylim(bottom=min(values) / room**2.5)


def plot_activation_by_side_bits(frame: DataFrame, ax: Axes) -> None:
    """As `plot_shift_by_side_bits`, for activation memory, on an axis from zero."""
    size, unit = unit_of(row["activation_peak_bytes"] for row in rows_of(frame))
    _plot_by_side_bits(frame, ax, "activation_peak_bytes", size, f"activation memory\n({unit}, {{}})")
    ax.set_ylim(0)


def plot_time_by_side_bits(frame: DataFrame, ax: Axes) -> None:
    """As `plot_shift_by_side_bits`, for the time of a step, on an axis from zero; the bars are its quartiles."""
    _plot_by_side_bits(frame, ax, "step_time_s", 1e-3, "step time (ms, {})")
    ax.set_ylim(0)


def _plot_by_side_bits(frame: DataFrame, ax: Axes, metric: str, size: float, label: str) -> None:
    rows = list(rows_of(frame))
    swept = [row for row in rows if row["side_bits"] is not None]
    with_value = [row for row in rows if row[metric] is not None]
    used_looks: set[tuple[str, str]] = set()
    for sweep in sorted({without_side_bits(row["parts"]): None for row in swept}, key=_by_look(swept)):
        of_sweep = sorted((r for r in swept if without_side_bits(r["parts"]) == sweep), key=lambda r: r["side_bits"])
        shade, marker, large = SWEEP[of_sweep[0]["coupling"], of_sweep[0]["output"]]
        # A sweep of the same coupling and output with another setting has the same colour and another marker.
        marker = next((mark for mark in (marker, *SETTING_MARKERS) if (shade, mark) not in used_looks), ".")
        used_looks.add((shade, marker))
        legend_text = _sweep_label(of_sweep)
        for source in sorted({row[f"{metric}_source"] for row in of_sweep if row[metric] is not None}):
            points = [r for r in of_sweep if r[metric] is not None and r[f"{metric}_source"] == source]
            xs, ys = [r["side_bits"] for r in points], [r[metric] / size for r in points]
            ax.plot(xs, ys, LINE[source], color=shade, marker=marker, markersize=large, linewidth=0.8 + large / 8,
                    markerfacecolor="white", markeredgewidth=1.4, label=legend_text)  # fmt: skip
            spread = [r for r in points if r[f"{metric}_low"] is not None and r[f"{metric}_high"] is not None]
            ax.vlines([r["side_bits"] for r in spread], [r[f"{metric}_low"] / size for r in spread],
                      [r[f"{metric}_high"] / size for r in spread], color=shade, linewidth=0.8)  # fmt: skip
    references = [row for row in rows if row["side_bits"] is None]
    for index, row in enumerate(references):
        shade, dashes = _REFERENCE[index % len(_REFERENCE)]
        if row[metric] is not None:
            ax.axhline(row[metric] / size, color=shade, linewidth=1.2, dashes=dashes, label=named(row["parts"]))
    sources = " and ".join(sorted({row[f"{metric}_source"] for row in with_value})) or "not taken"
    ax.set(xlabel="side bits m, factor 2⁻ᵐ", ylabel=label.format(sources))
    places = sorted({row["side_bits"] for row in swept})
    ax.set_xticks(places, [f"{m}\n1/{2**m}" for m in places])
    # The outermost side bits keep their place on the axis even without a value.
    ax.set_xlim(places[0] - 0.4, places[-1] + 0.4)
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax, title="coupling, output")


def _by_look(swept: list[dict[str, Any]]) -> Callable[[str], int]:
    looks = {without_side_bits(row["parts"]): (row["coupling"], row["output"]) for row in swept}
    return lambda sweep: list(SWEEP).index(looks[sweep])


def _sweep_label(rows: list[dict[str, Any]]) -> str:
    """`paper, mean`, further settings and levers, and the side bits of cells that did not end ok, with their status."""
    method, *levers = rows[0]["parts"]
    besides = method.without("side_bits", "coupling", "output", "arithmetic").texts()
    failed = [f"m={row['side_bits']}: {row['status']}" for row in rows if row["status"] != "ok"]
    beside = "".join(f" +{lever.label}" for lever in levers)
    text = ", ".join([rows[0]["coupling"], rows[0]["output"], *besides]) + beside
    return "\n".join([text, *textwrap.wrap(", ".join(failed), LABEL_WIDTH)])
