"""Figures: which plots a run has, their panels and captions, saved as the same PNG and SVG on every machine."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.plan.axes import SHAPE
from meftbench.report.figures import plots, score_plots, side_bits
from meftbench.report.figures.picture import Picture
from meftbench.report.results import (
    WRONG_GRADIENT,
    Group,
    groups,
    methods_in_order,
    parts_by_method,
    rows_of,
    setting_text,
    shape_text,
    without_side_bits,
    wrong_gradient,
)
from meftbench.report.views import ablations
from meftbench.report.views.scores import COMPARED, differing_settings, results, trained, untrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# A figure draws at most this many panels, since more would not be read; the table has all cells.
_MAX_PANELS = 8
SCORES = ("score", "accuracy", "f1", "matthews", "pearson", "spearman")
Draw = Callable[["DataFrame", "Axes"], None]
# Plots that stand above each other over the same side bits; one whose metric the run did not take is left out.
_BY_SIDE_BITS: dict[str, Draw] = {
    "starting_point_shift": side_bits.plot_shift_by_side_bits,
    "activation_peak_bytes": side_bits.plot_activation_by_side_bits,
    "step_time_s": side_bits.plot_time_by_side_bits,
}


@dataclass(frozen=True)
class Panel:
    """One axes of a figure, or one column of axes: its title, and the cells it shows."""

    title: str
    frame: DataFrame


@dataclass(frozen=True)
class Kind:
    """A figure that a model may have. draws: the plot of a panel, or several that stand above each other in it.

    note: printed below the panels, such as what is left out.  metrics: that it shows.
    """

    name: str
    title: str
    draws: list[Draw]
    panels: list[Panel]
    metrics: tuple[str, ...]
    note: str = ""


def pictures(frame: DataFrame) -> list[Picture]:
    """The figures of one run or several, one of each kind per model; kinds without data are left out."""
    found: list[Picture] = []
    models = list(dict.fromkeys(frame["model"]))
    for model in models:
        of_model = frame[frame["model"] == model]
        several = len(models) > 1
        for kind in _kinds(of_model):
            if kind.panels:
                slug = f"{kind.name}-{_slug(model)}" if several else kind.name
                heading = f"{kind.title}: {model}"
                found.append(Picture(slug, heading, _alt(heading, kind), partial(_figure, heading, kind), _data(kind)))
    return found


def _data(kind: Kind) -> DataFrame:
    """The numbers of a figure: for each panel its cells, with the metrics in their units, their spread and sources."""
    from pandas import concat

    parts = [panel.frame.assign(panel=panel.title) for panel in kind.panels]
    columns = ["panel", "run", "cell_id", "label", "method", *SHAPE, "seed", "learning_rate", "status"]
    columns += [f"{metric}{part}" for metric in kind.metrics for part in ("", "_low", "_high", "_source")]
    whole = concat(parts, ignore_index=True)
    return whole[[name for name in columns if name in whole]].dropna(axis="columns", how="all")


def _kinds(whole: DataFrame) -> list[Kind]:
    return [*_training_kinds(trained(whole)), *_memory_kinds(untrained(whole))]


def _training_kinds(frame: DataFrame) -> list[Kind]:
    """The figures of training: a panel per task and setting."""
    panels = []
    comparable = [rows for _, rows in frame.groupby(list(COMPARED), sort=False, dropna=False) if results(rows)]
    firsts = [next(rows_of(rows)) for rows in comparable]
    differing = [*(["precision"] if len({row["precision"] for row in firsts}) > 1 else []), *differing_settings(firsts)]
    for rows, first in zip(comparable, firsts, strict=True):
        shape = shape_text(*(first[name] for name in SHAPE))
        settings = "".join(f", {setting_text(name, first[name])}" for name in differing)
        panels.append(Panel(f"{first['task']}, {shape}{settings}", rows))
    # A single evaluation is a point and not a curve.
    curves = [panel for panel in panels if any(len(curve or ()) > 1 for curve in panel.frame["learning_curve"])]
    memory, time = score_plots.plot_score_by_memory, score_plots.plot_score_by_time
    score_note = (
        "A line joins the methods that no cheaper one equals within the deviation over seeds; others are paler. "
        "Bars: that deviation."
    )
    swept = {axis: [panel for panel in panels if ablations.sweeps(panel.frame, axis)] for axis in ablations.AXES}
    shifts = [panel for panel in panels if ablations.shifted(panel.frame)]
    bars = "Bars: standard deviation over seeds."
    return [
        Kind("score-by-memory", "Score and activation memory", [memory], panels,
             (*SCORES, "activation_peak_bytes"), score_note),
        Kind("score-by-time", "Score and training time", [time], panels,
             (*SCORES, "training_time_s"), score_note),
        Kind("learning-curves", "Learning curves", [score_plots.plot_learning_curves], curves, ("learning_curve",),
             "Bands: lowest and highest of the seeds."),
        Kind("score-by-shift", "Score and starting-point shift", [ablations.plot_score_by_shift], shifts,
             (*SCORES, "starting_point_shift"), bars),
        *(Kind(f"score-by-{axis.replace('_', '-')}", f"Score and {axis.replace('_', ' ')}", ablations.draws_for(axis),
               swept_panels, SCORES, bars) for axis, swept_panels in swept.items()),
    ]  # fmt: skip


def _memory_kinds(whole: DataFrame) -> list[Kind]:
    if not len(whole):
        return []
    sweeps = _side_bits_panels(whole)
    swept = [metric for metric in _BY_SIDE_BITS if any(panel.frame[metric].notna().any() for panel in sweeps)]
    frame, note = _one_of_each_sweep(whole, sweeps)
    shapes = _panels_at_one_shape(frame, "peak_allocated_bytes")
    errors = _panels_at_one_shape(frame, "reconstruction_rel")
    speeds = [panel for panel in shapes if panel.frame["tokens_per_s"].notna().any()]
    by_length = _panels_along(frame, ["batch_size", "micro_batch_size"], "sequence_length", "batch {0}{1}")
    # Along the batch axis the micro-batch either grows with the batch or stays fixed: these are different curves.
    by_batch = _panels_along(frame, ["sequence_length", "_micro"], "batch_size", "{0} tokens{1}")
    by_side_bits = [_BY_SIDE_BITS[metric] for metric in swept]
    activation = "activation_peak_bytes"
    length, batch = plots.plot_activation_by_length, plots.plot_activation_by_batch
    peak, speed = "peak_allocated_bytes", "tokens_per_s"
    parts, layers, front = plots.plot_breakdown, plots.plot_reconstruction, plots.plot_memory_against_speed
    speed_note = " ".join(filter(None, [note, _wrong_gradient_note(speeds)]))
    return [
        Kind("side-bits", "What the side bits of exact reversal buy and cost", by_side_bits, sweeps if swept else [],
             tuple(swept)),
        Kind("activation-by-length", "Activation memory and sequence length", [length], by_length, (activation,), note),
        Kind("activation-by-batch", "Activation memory and batch size", [batch], by_batch, (activation,), note),
        Kind("breakdown", "What the peak consists of", [parts], shapes, (peak, *BREAKDOWN), note),
        Kind("reconstruction", "Reconstruction error per layer", [layers], errors, ("reconstruction_rel",), note),
        Kind("memory-and-speed", "Memory and speed", [front], speeds, (peak, speed, "gradient_rel_max"), speed_note),
    ]  # fmt: skip


def _wrong_gradient_note(panels: list[Panel]) -> str:
    if not any(wrong_gradient(row) for panel in panels for row in rows_of(panel.frame)):
        return ""
    return f"Hollow: the gradient is wrong by more than {WRONG_GRADIENT:.0%}; left out when methods are compared."


def _side_bits_panels(frame: DataFrame) -> list[Panel]:
    """A panel for each setting and exact method that was run at two or more side bits: those cells, at one shape.

    With them the methods to compare with: the same method in floating point, as published, and `lora+checkpoint`.
    """
    panels: list[Panel] = []
    exact = frame[frame["side_bits"].notna() & (frame["status"] == "ok")]
    lines = _labels_with_line(exact)  # a sweep at one shape is one over all of them
    exact = exact[exact["parts"].map(without_side_bits).isin(lines)]
    names = list(dict.fromkeys(exact["method_name"]))
    all_groups = groups(frame) if names else []
    for group in all_groups:
        for name in names:
            best: tuple[tuple[int, int], DataFrame] | None = None
            for _, rows in group.frame.groupby(list(SHAPE), sort=True):
                swept_rows = rows[(rows["method_name"] == name) & rows["side_bits"].notna()]
                swept_rows = swept_rows[swept_rows["parts"].map(without_side_bits).isin(_labels_with_line(swept_rows))]
                size = int(rows["batch_size"].iloc[0]) * int(rows["sequence_length"].iloc[0])
                if len(swept_rows) and (best is None or (len(swept_rows), size) >= best[0]):
                    references = rows[rows["method"].isin(["lora+checkpoint", name.removesuffix("-exact")])]
                    shown = rows[rows["cell_id"].isin([*swept_rows["cell_id"], *references["cell_id"]])]
                    best = ((len(swept_rows), size), shown)
            if best is not None:
                first = best[1].iloc[0]
                shape = shape_text(*(first[name] for name in SHAPE))
                panels.append(Panel(_with_setting(f"{name}, {shape}", group, all_groups), best[1]))
    return panels


def _labels_with_line(lines: DataFrame) -> set[str]:
    """The method labels, without side bits, that ended ok at two side bits or more: fewer make no line."""
    bits: dict[str, set[int]] = {}
    for row in rows_of(lines[lines["status"] == "ok"]):
        bits.setdefault(without_side_bits(row["parts"]), set()).add(row["side_bits"])
    return {sweep for sweep, values in bits.items() if len(values) > 1}


def _one_of_each_sweep(frame: DataFrame, sweeps: list[Panel]) -> tuple[DataFrame, str]:
    """The frame with one number of side bits of each sweep over them, and the sentence that says so.

    A sweep has a figure of its own, and dozens of methods that differ in side bits alone would hide all others
    elsewhere. Kept is the number with the most cells; of several, the one nearest to the default, 3.
    """
    drawn = {without_side_bits(row["parts"]) for panel in sweeps for row in rows_of(panel.frame) if row["side_bits"]}
    if not drawn:
        return frame, ""
    counts: dict[str, dict[int, int]] = {}
    for row in rows_of(frame):
        if row["side_bits"] is not None and row["status"] == "ok":
            rows_by_bits = counts.setdefault(without_side_bits(row["parts"]), {})
            rows_by_bits[row["side_bits"]] = rows_by_bits.get(row["side_bits"], 0) + 1
    kept = {sweep: min(counts[sweep], key=lambda m: (-counts[sweep][m], abs(m - 3), m)) for sweep in drawn}
    stays = [
        kept.get(without_side_bits(parts), bits) == bits
        for parts, bits in zip(frame["parts"], frame["side_bits"], strict=True)
    ]
    shown = " and ".join(str(m) for m in sorted({*kept.values()}))
    return frame[stays], f"Methods that were run at several side bits are shown at {shown} alone."


def _panels_along(frame: DataFrame, fixed: list[str], axis: str, title: str) -> list[Panel]:
    """A panel for each setting and values of `fixed`, where activation memory is known along the axis."""
    micro = [
        "" if batch == small else f", micro-batch {small}"
        for batch, small in zip(frame["batch_size"], frame["micro_batch_size"], strict=True)
    ]
    marked = frame.assign(_micro=micro)
    panels: list[Panel] = []
    all_groups = groups(marked)
    for group in all_groups:
        for _, rows in group.frame.groupby(fixed, sort=True):
            if rows["activation_peak_bytes"].notna().any():
                panel_title = title.format(rows[fixed[0]].iloc[0], rows["_micro"].iloc[0])
                panels.append(Panel(_with_setting(panel_title, group, all_groups), rows))
    # A panel with one value on the axis shows no curve; what the peak consists of shows these cells.
    return [panel for panel in panels if panel.frame[axis].nunique() > 1]


def _panels_at_one_shape(frame: DataFrame, metric: str) -> list[Panel]:
    """A panel for each setting: the shape at which most methods have the metric; of several, the largest."""
    panels: list[Panel] = []
    all_groups = groups(frame)
    for group in all_groups:
        best: tuple[tuple[int, int], DataFrame] | None = None
        for _, rows in group.frame.groupby(list(SHAPE), sort=True):
            known = int(rows[metric].notna().sum())
            size = int(rows["batch_size"].iloc[0]) * int(rows["sequence_length"].iloc[0])
            if known and (best is None or (known, size) >= best[0]):
                best = ((known, size), rows)
        if best is not None:
            first = best[1].iloc[0]
            shape = shape_text(*(first[name] for name in SHAPE))
            panels.append(Panel(_with_setting(shape, group, all_groups), best[1]))
    return panels


def _with_setting(text: str, group: Group, all_groups: list[Group]) -> str:
    return text if len(all_groups) == 1 else f"{text}, {group.title.partition(', ')[2]}"


def _figure(heading: str, kind: Kind) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels, plots_per_panel = kind.panels, len(kind.draws)
    # With several plots above each other in a panel, a screen has room for two panels.
    shown = panels[: _MAX_PANELS if plots_per_panel == 1 else 2]
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        columns = 1 if len(shown) == 1 else 2
        lines = -(-len(shown) // columns)
        tallest = max(plots.height_of_labels(panel.frame) for panel in shown)
        height = max(3.2, 1.4 + tallest) if plots_per_panel == 1 else 2.2 * plots_per_panel
        figure = Figure(figsize=(6.8 * columns, height * lines + 0.4), layout="constrained")
        for index, panel in enumerate(shown):
            column: list[Axes] = []
            for plot_row, draw in enumerate(kind.draws):
                # A panel takes one place of the grid, or a column of it.
                position = (
                    (lines, columns, index + 1)
                    if plots_per_panel == 1
                    else (plots_per_panel, columns, plot_row * columns + index + 1)
                )
                ax = figure.add_subplot(*position, sharex=column[0] if column else None)
                draw(panel.frame, ax)
                column.append(ax)
            column[0].set_title(panel.title, loc="left")
            if plots_per_panel > 1:
                _share_axis_and_legend(column)
        rest = (
            f" (the first {len(shown)} of {len(panels)} settings; the table has all)"
            if len(panels) > len(shown)
            else ""
        )
        # A long name of a model would run out of the picture; nine bold letters of this size take an inch.
        title = textwrap.fill(heading + rest, round(9 * figure.get_figwidth()), break_long_words=False,
                              break_on_hyphens=False)  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if kind.note:
            # About 18 small letters take an inch.
            note = textwrap.fill(kind.note, round(18 * figure.get_figwidth()))
            figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
        return figure


def _share_axis_and_legend(column: list[Axes]) -> None:
    """Leave axes above each other the lowest x axis and one legend, at the top, that has every label once."""
    handles_by_label: dict[str, Any] = {}
    for ax in column:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles_by_label.setdefault(label, handle)
        title = legend.get_title().get_text() if (legend := ax.get_legend()) else None
        if ax is not column[-1]:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
        if ax is not column[0] and legend:
            legend.remove()
    plots.legend_beside(column[0], title, handles_by_label)


def _alt(heading: str, kind: Kind) -> str:
    methods = dict.fromkeys(method for panel in kind.panels for method in methods_in_order(panel.frame))
    name_of = {m: parts[0].name for panel in kind.panels for m, parts in parts_by_method(panel.frame).items()}
    names = [name_of[method] for method in methods]
    # Of a method with more than eight settings only their number is given.
    many_settings = {name: names.count(name) for name in names if names.count(name) > 8}
    descriptions = dict.fromkeys(
        f"{name} ({many_settings[name]} settings)" if name in many_settings else method
        for name, method in zip(names, methods, strict=True)
    )
    titles = "; ".join(panel.title for panel in kind.panels)
    note = f" {kind.note}" if kind.note else ""
    return f"{heading}, for {', '.join(descriptions)}; panels: {titles}.{note} The table has the numbers."


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "model"
