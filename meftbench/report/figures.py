"""Figures: which plots a run has, their panels and captions, and the same bytes as PNG and SVG on every machine."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meftbench.report import plots
from meftbench.report.tables import SHAPE, Group, groups, methods_in_order, shape_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# More panels than this are not read; the table has all cells.
_MAX_PANELS = 8
_PIXELS_AN_INCH = 96
Draw = Callable[["DataFrame", "Axes"], None]


@dataclass(frozen=True)
class Panel:
    """One axes of a figure: its title, and the cells it shows."""

    title: str
    frame: DataFrame


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
        for name, title, draw, panels in _kinds(mine):
            if panels:
                slug = f"{name}-{_slug(model)}" if several else name
                heading = f"{title}: {model}"
                found.append(Picture(slug, heading, _alt(heading, panels), _figure(heading, draw, panels)))
    return found


def _kinds(frame: DataFrame) -> list[tuple[str, str, Draw, list[Panel]]]:
    shapes = _one_shape(frame, "peak_allocated_bytes")
    errors = [Panel(p.title, p.frame) for p in _one_shape(frame, "reconstruction_rel")]
    speeds = [panel for panel in shapes if panel.frame["tokens_per_s"].notna().any()]
    by_length = _apart(frame, ["batch_size", "micro_batch_size"], "sequence_length", "batch {0}{1}")
    # Along the batch axis the micro-batch follows the batch, or stands still: the two are different curves.
    by_batch = _apart(frame, ["sequence_length", "_micro"], "batch_size", "{0} tokens{1}")
    return [
        ("activation-by-length", "Activation memory and sequence length", plots.plot_activation_by_length, by_length),
        ("activation-by-batch", "Activation memory and batch size", plots.plot_activation_by_batch, by_batch),
        ("breakdown", "What the peak consists of", plots.plot_breakdown, shapes),
        ("reconstruction", "Reconstruction error per layer", plots.plot_reconstruction, errors),
        ("memory-and-speed", "Memory and speed", plots.plot_memory_against_speed, speeds),
    ]


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
            shape = shape_text(first["batch_size"], first["micro_batch_size"], first["sequence_length"])
            found.append(Panel(_titled(shape, group, several), best[1]))
    return found


def _titled(text: str, group: Group, among: list[Group]) -> str:
    return text if len(among) == 1 else f"{text}, {group.title.partition(', ')[2]}"


def _figure(heading: str, draw: Draw, panels: list[Panel]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = panels[:_MAX_PANELS]
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        columns = 1 if len(shown) == 1 else 2
        lines = -(-len(shown) // columns)
        tallest = max(len(methods_in_order(panel.frame)) for panel in shown)
        height = max(3.2, 1.4 + 0.24 * tallest)
        figure = Figure(figsize=(6.8 * columns, height * lines + 0.4), layout="constrained")
        for index, panel in enumerate(shown):
            ax = figure.add_subplot(lines, columns, index + 1)
            draw(panel.frame, ax)
            ax.set_title(panel.title, loc="left")
        rest = (
            f" (the first {_MAX_PANELS} of {len(panels)} settings; the table has all)"
            if len(panels) > len(shown)
            else ""
        )
        # A long name of a model would run out of the picture; nine bold letters of this size take an inch.
        title = textwrap.fill(heading + rest, round(9 * figure.get_figwidth()), break_long_words=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure


def _alt(heading: str, panels: list[Panel]) -> str:
    methods = dict.fromkeys(method for panel in panels for method in methods_in_order(panel.frame))
    titles = "; ".join(panel.title for panel in panels)
    return f"{heading}, for {', '.join(methods)}; panels: {titles}. The table has the numbers."


def _saved(figure: Figure, kind: str, salt: str) -> bytes:
    from matplotlib import rc_context

    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "path", "font.size": 9}):
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "model"
