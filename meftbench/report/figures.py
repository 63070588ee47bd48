"""Figures: which plots a run has, their panels and captions, and the same bytes as PNG and SVG on every machine."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.report import ablations, plots, score_plots, side_bits
from meftbench.report.scores import COMPARED, differing_settings, results, trained, untrained
from meftbench.report.tables import (
    SHAPE,
    WRONG_GRADIENT,
    Group,
    groups,
    methods_in_order,
    parts_of,
    rows_of,
    setting_text,
    shape_text,
    without_side_bits,
    wrong_gradient,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# More panels than this are not read; the table has all cells.
_MAX_PANELS = 8
_PIXELS_AN_INCH = 96
Draw = Callable[["DataFrame", "Axes"], None]
# One above the other, over the same side bits; a metric that the run did not take has no row.
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
    """A figure that a model may have. draws: one, or several that stand above each other in a column a panel.

    note: what it leaves out, said below the panels.
    """

    name: str
    title: str
    draws: list[Draw]
    panels: list[Panel]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawn figure. name: of the files, without ending.  alt: what it shows, for who does not see it."""

    name: str
    title: str
    alt: str
    figure: Figure

    def svg(self) -> str:
        """The figure as SVG text; the same on every machine and day."""
        return _saved(self.figure, "svg", self.name).decode()

    def inline(self) -> str:
        """The `<svg>` element for a page: ids made its own, named for screen readers, sized by the page."""
        text = self.svg()
        element = text[text.index("<svg") :]
        # Two figures in one page may not share an id.
        element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", element)
        element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
        # As wide as the page, but not so wide that one panel fills the screen.
        width = f"max-width: {self.figure.get_figwidth() * _PIXELS_AN_INCH:.0f}px"
        element = re.sub(r'\s(width|height)="[^"]*pt"', "", element, count=2)
        return element.replace("<svg", f'<svg style="{width}" role="img" aria-hidden="true"', 1)

    def write(self, folder: Path) -> None:
        """NAME.png and NAME.svg in `folder`."""
        (folder / f"{self.name}.svg").write_text(self.svg(), encoding="utf-8")
        (folder / f"{self.name}.png").write_bytes(_saved(self.figure, "png", self.name))


def pictures(frame: DataFrame) -> list[Picture]:
    """The figures of a run or several, one of each kind for each model; kinds without data are left out."""
    found: list[Picture] = []
    models = list(dict.fromkeys(frame["model"]))
    for model in models:
        mine = frame[frame["model"] == model]
        several = len(models) > 1
        for kind in _kinds(mine):
            if kind.panels:
                slug = f"{kind.name}-{_slug(model)}" if several else kind.name
                heading = f"{kind.title}: {model}"
                found.append(Picture(slug, heading, _alt(heading, kind), _figure(heading, kind)))
    return found


def _kinds(whole: DataFrame) -> list[Kind]:
    return [*_quality(trained(whole)), *_memory(untrained(whole))]


def _quality(frame: DataFrame) -> list[Kind]:
    """The figures of trainings: a panel a task, in one setting."""
    panels = []
    apart = [rows for _, rows in frame.groupby(list(COMPARED), sort=False, dropna=False) if results(rows)]
    firsts = [next(rows_of(rows)) for rows in apart]
    differing = [*(["precision"] if len({row["precision"] for row in firsts}) > 1 else []), *differing_settings(firsts)]
    for rows, first in zip(apart, firsts, strict=True):
        shape = shape_text(*(first[name] for name in SHAPE))
        rest = "".join(f", {setting_text(name, first[name])}" for name in differing)
        panels.append(Panel(f"{first['task']}, {shape}{rest}", rows))
    # Of one evaluation there is a point, and no curve.
    curves = [panel for panel in panels if any(len(curve or ()) > 1 for curve in panel.frame["learning_curve"])]
    memory, time = score_plots.plot_score_by_memory, score_plots.plot_score_by_time
    paler = "A line joins the methods that no other beats in both; others are paler. Bars: deviation over seeds."
    swept = {axis: [panel for panel in panels if ablations.sweeps(panel.frame, axis)] for axis in ablations.AXES}
    shifts = [panel for panel in panels if ablations.shifted(panel.frame)]
    bars = "Bars: standard deviation over seeds."
    return [
        Kind("score-by-memory", "Score and activation memory", [memory], panels, paler),
        Kind("score-by-time", "Score and training time", [time], panels, paler),
        Kind("learning-curves", "Learning curves", [score_plots.plot_learning_curves], curves,
             "Bands: lowest and highest of the seeds."),
        Kind("score-by-shift", "Score and starting-point shift", [ablations.plot_score_by_shift], shifts, bars),
        *(Kind(f"score-by-{axis.replace('_', '-')}", f"Score and {axis.replace('_', ' ')}", ablations.draws_for(axis),
               where, bars) for axis, where in swept.items()),
    ]  # fmt: skip


def _memory(whole: DataFrame) -> list[Kind]:
    if not len(whole):
        return []
    sweeps = _sweeps(whole)
    swept = [metric for metric in _BY_SIDE_BITS if any(panel.frame[metric].notna().any() for panel in sweeps)]
    frame, note = _one_of_each_sweep(whole, sweeps)
    shapes = _one_shape(frame, "peak_allocated_bytes")
    errors = _one_shape(frame, "reconstruction_rel")
    speeds = [panel for panel in shapes if panel.frame["tokens_per_s"].notna().any()]
    by_length = _apart(frame, ["batch_size", "micro_batch_size"], "sequence_length", "batch {0}{1}")
    # Along the batch axis the micro-batch follows the batch, or stands still: the two are different curves.
    by_batch = _apart(frame, ["sequence_length", "_micro"], "batch_size", "{0} tokens{1}")
    by_side_bits = [_BY_SIDE_BITS[metric] for metric in swept]
    length, batch = plots.plot_activation_by_length, plots.plot_activation_by_batch
    return [
        Kind("side-bits", "What the side bits of exact reversal buy and cost", by_side_bits, sweeps if swept else []),
        Kind("activation-by-length", "Activation memory and sequence length", [length], by_length, note),
        Kind("activation-by-batch", "Activation memory and batch size", [batch], by_batch, note),
        Kind("breakdown", "What the peak consists of", [plots.plot_breakdown], shapes, note),
        Kind("reconstruction", "Reconstruction error per layer", [plots.plot_reconstruction], errors, note),
        Kind(
            "memory-and-speed",
            "Memory and speed",
            [plots.plot_memory_against_speed],
            speeds,
            " ".join(filter(None, [note, _wrong(speeds)])),
        ),
    ]


def _wrong(panels: list[Panel]) -> str:
    if not any(wrong_gradient(row) for panel in panels for row in rows_of(panel.frame)):
        return ""
    return f"Hollow: the gradient is wrong by more than {WRONG_GRADIENT:.0%}; left out when methods are compared."


def _sweeps(frame: DataFrame) -> list[Panel]:
    """For each setting and exact method that has one setting at two or more side bits: those cells at one shape.

    With them what they are held against: the same method in floating point, as published, and `lora+checkpoint`.
    """
    found: list[Panel] = []
    exact = frame[frame["side_bits"].notna() & (frame["status"] == "ok")]
    names = list(dict.fromkeys(exact["method_name"]))
    several = groups(frame)
    for group in several:
        for name in names:
            best: tuple[tuple[int, int], DataFrame] | None = None
            for _, rows in group.frame.groupby(list(SHAPE), sort=True):
                lines = rows[(rows["method_name"] == name) & rows["side_bits"].notna()]
                lines = lines[lines["method"].map(without_side_bits).isin(_swept(lines))]
                size = int(rows["batch_size"].iloc[0]) * int(rows["sequence_length"].iloc[0])
                if len(lines) and (best is None or (len(lines), size) >= best[0]):
                    others = rows[rows["method"].isin(["lora+checkpoint", name.removesuffix("-exact")])]
                    shown = rows[rows["cell_id"].isin([*lines["cell_id"], *others["cell_id"]])]
                    best = ((len(lines), size), shown)
            if best is not None:
                first = best[1].iloc[0]
                shape = shape_text(*(first[name] for name in SHAPE))
                found.append(Panel(_titled(f"{name}, {shape}", group, several), best[1]))
    return found


def _swept(lines: DataFrame) -> set[str]:
    """The methods, side bits aside, that have numbers at two of them at least: fewer are no line."""
    bits: dict[str, set[int]] = {}
    for row in rows_of(lines[lines["status"] == "ok"]):
        bits.setdefault(without_side_bits(row["method"]), set()).add(row["side_bits"])
    return {sweep for sweep, found in bits.items() if len(found) > 1}


def _one_of_each_sweep(frame: DataFrame, sweeps: list[Panel]) -> tuple[DataFrame, str]:
    """The frame with one cell of each sweep over side bits, and the sentence that says so.

    A sweep has a figure of its own, and dozens of methods that differ in a bit would bury all others elsewhere. Kept
    is what most shapes have; of those what is nearest to the default, 3.
    """
    drawn = {without_side_bits(row["method"]) for panel in sweeps for row in rows_of(panel.frame) if row["side_bits"]}
    if not drawn:
        return frame, ""
    counts: dict[str, dict[int, int]] = {}
    for row in rows_of(frame):
        if row["side_bits"] is not None and row["status"] == "ok":
            of = counts.setdefault(without_side_bits(row["method"]), {})
            of[row["side_bits"]] = of.get(row["side_bits"], 0) + 1
    kept = {sweep: min(counts[sweep], key=lambda m: (-counts[sweep][m], abs(m - 3), m)) for sweep in drawn}
    stays = [
        kept.get(without_side_bits(method), bits) == bits
        for method, bits in zip(frame["method"], frame["side_bits"], strict=True)
    ]
    shown = " and ".join(str(m) for m in sorted({*kept.values()}))
    return frame[stays], f"Methods that were run at several side bits are shown at {shown} alone."


def _apart(frame: DataFrame, fixed: list[str], axis: str, title: str) -> list[Panel]:
    """A panel for each setting and value of `fixed`, where the axis has something to show."""
    micro = [
        "" if batch == small else f", micro-batch {small}"
        for batch, small in zip(frame["batch_size"], frame["micro_batch_size"], strict=True)
    ]
    marked = frame.assign(_micro=micro)
    found: list[Panel] = []
    several = groups(marked)
    for group in several:
        for _, rows in group.frame.groupby(fixed, sort=True):
            if rows["activation_peak_bytes"].notna().any():
                said = title.format(rows[fixed[0]].iloc[0], rows["_micro"].iloc[0])
                found.append(Panel(_titled(said, group, several), rows))
    longest = max((panel.frame[axis].nunique() for panel in found), default=0)
    # A panel with one place on the axis is no curve; it is kept where no other has more.
    return [panel for panel in found if panel.frame[axis].nunique() > 1 or longest == 1]


def _one_shape(frame: DataFrame, metric: str) -> list[Panel]:
    """For each setting the shape at which most methods have the metric; of those the largest."""
    found: list[Panel] = []
    several = groups(frame)
    for group in several:
        best: tuple[tuple[int, int], DataFrame] | None = None
        for _, rows in group.frame.groupby(list(SHAPE), sort=True):
            known = int(rows[metric].notna().sum())
            size = int(rows["batch_size"].iloc[0]) * int(rows["sequence_length"].iloc[0])
            if known and (best is None or (known, size) >= best[0]):
                best = ((known, size), rows)
        if best is not None:
            first = best[1].iloc[0]
            shape = shape_text(*(first[name] for name in SHAPE))
            found.append(Panel(_titled(shape, group, several), best[1]))
    return found


def _titled(text: str, group: Group, among: list[Group]) -> str:
    return text if len(among) == 1 else f"{text}, {group.title.partition(', ')[2]}"


def _figure(heading: str, kind: Kind) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels, deep = kind.panels, len(kind.draws)
    # One above the other, three axes are as much as a screen holds.
    shown = panels[: _MAX_PANELS if deep == 1 else 2]
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        columns = 1 if len(shown) == 1 else 2
        lines = -(-len(shown) // columns)
        tallest = max(plots.height_of_labels(panel.frame) for panel in shown)
        height = max(3.2, 1.4 + tallest) if deep == 1 else 2.2 * deep
        figure = Figure(figsize=(6.8 * columns, height * lines + 0.4), layout="constrained")
        for index, panel in enumerate(shown):
            column: list[Axes] = []
            for place, draw in enumerate(kind.draws):
                # One panel a place in the grid, or one a column.
                where = (lines, columns, index + 1) if deep == 1 else (deep, columns, place * columns + index + 1)
                ax = figure.add_subplot(*where, sharex=column[0] if column else None)
                draw(panel.frame, ax)
                column.append(ax)
            column[0].set_title(panel.title, loc="left")
            if deep > 1:
                _share(column)
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
            below = textwrap.fill(kind.note, round(18 * figure.get_figwidth()))
            figure.supxlabel(below, x=0.01, ha="left", fontsize=8, color="#555555")
        return figure


def _share(column: list[Axes]) -> None:
    """One axis and one legend for axes above each other: the axis below, the legend at the top, every label once."""
    found: dict[str, Any] = {}
    for ax in column:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
        title = legend.get_title().get_text() if (legend := ax.get_legend()) else None
        if ax is not column[-1]:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
        if ax is not column[0] and legend:
            legend.remove()
    plots.legend_beside(column[0], title, found)


def _alt(heading: str, kind: Kind) -> str:
    methods = dict.fromkeys(method for panel in kind.panels for method in methods_in_order(panel.frame))
    names = [parts_of(method)[0] for method in methods]
    # Dozens of settings of one method are counted, not read out.
    several = {name: names.count(name) for name in names if names.count(name) > 8}
    said = dict.fromkeys(
        f"{name} ({several[name]} settings)" if name in several else method
        for name, method in zip(names, methods, strict=True)
    )
    titles = "; ".join(panel.title for panel in kind.panels)
    note = f" {kind.note}" if kind.note else ""
    return f"{heading}, for {', '.join(said)}; panels: {titles}.{note} The table has the numbers."


def _saved(figure: Figure, kind: str, salt: str) -> bytes:
    from matplotlib import rc_context

    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "path", "font.size": 9}):
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "model"
