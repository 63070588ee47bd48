"""The figure of a step over time: live bytes, stacked by category, with the phases marked; a panel per cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meftbench.report.figures.picture import Picture
from meftbench.report.figures.plots import legend_beside, unit_of
from meftbench.report.figures.style import CATEGORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From the bottom of the stack: what lives longest comes first.
_ORDER = ("parameters", "buffers", "inputs", "other", "optimizer", "gradients", "activations", "temporaries")


def timeline_picture(answers: Sequence[dict[str, Any]], name: str = "timeline") -> Picture:
    """The figure of the cells; its panels share the axis of bytes.

    answers: the `cells` of what meftbench.prediction.timeline.export returned.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shared, titles = _titles(answers)
    title = f"Memory during a step: {shared}, on {answers[0]['device']}"
    columns = min(2 if len(answers) == 4 else 3, len(answers))
    lines = -(-len(answers) // columns)
    highest = max(answer["peak_allocated_bytes"] for answer in answers)
    size = (9.0, 3.8) if len(answers) == 1 else (1.4 + 4.2 * columns, 0.5 + 3.1 * lines)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        first: Axes | None = None
        for index, answer in enumerate(answers):
            ax = figure.add_subplot(lines, columns, index + 1, sharey=first)
            plot_timeline(answer, ax, highest)
            if titles[index]:
                ax.set_title(titles[index], loc="left", pad=16, fontsize=9, wrap=True)
            if index % columns:
                ax.set_ylabel("")
                ax.tick_params(labelleft=False)
            if index + columns < len(answers):
                ax.set_xlabel("")
            first = first or ax
        _legend([*figure.axes], columns)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", wrap=True)
    unit_size, unit = unit_of([highest])
    peaks = (f"{answer['method']} {answer['peak_allocated_bytes'] / unit_size:,.1f} {unit}" for answer in answers)
    phases = ", ".join(phase for phase, _ in answers[0]["timeline"]["phases"])
    return Picture(name, title, f"{title}, predicted; peak of {'; '.join(peaks)}; {phases}", lambda: figure)


def _titles(answers: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """The text that the cells share, and a title for each panel: the method where they differ in it alone."""
    labels = [answer["label"] for answer in answers]
    if len(answers) == 1:
        return labels[0], [""]
    rests = {label.replace(f"/{answer['method']}/", "/", 1) for label, answer in zip(labels, answers, strict=True)}
    if len(rests) == 1:
        return rests.pop(), [answer["method"] for answer in answers]
    return f"{len(answers)} cells", labels


def plot_timeline(answer: dict[str, Any], ax: Axes, highest: int | None = None) -> None:
    """Draw live bytes over allocations and frees, stacked; what lives longest is at the bottom.

    highest: bytes that the axis has room for; None: the peak of this cell.
    """
    timeline = answer["timeline"]
    highest = highest or answer["peak_allocated_bytes"]
    size, unit = unit_of([highest])
    shades = {name.removesuffix("_bytes"): shade for name, shade in CATEGORY.items()}
    shown = [kind for kind in _ORDER if any(timeline["levels"][kind])]
    ax.stackplot(
        timeline["at"],
        [[level / size for level in timeline["levels"][kind]] for kind in shown],
        labels=["optimizer state" if kind == "optimizer" else kind for kind in shown],
        colors=[shades[kind] for kind in shown],
        step="post",
        linewidth=0,
    )
    peak = answer["peak_allocated_bytes"] / size
    ax.axhline(peak, color="#999999", linewidth=0.8, linestyle="--")
    ax.annotate(f"peak {peak:,.1f}", (1.0, peak), xycoords=("axes fraction", "data"), xytext=(-2, 2), ha="right",
                textcoords="offset points", fontsize=8)  # fmt: skip
    length = max(timeline["at"], default=1)
    for phase, place in timeline["phases"]:
        if phase != "end":
            ax.axvline(place, color="black", linewidth=0.6, linestyle=":")
            # Right of a line near the end the word would leave the panel.
            offset, side = (-2, "right") if place > 0.8 * length else (2, "left")
            ax.annotate(phase, (place, 1.0), xycoords=("data", "axes fraction"), xytext=(offset, 2), ha=side,
                        textcoords="offset points", fontsize=8, va="bottom")  # fmt: skip
    ax.set(xlabel="allocations and frees of the step", ylabel=f"allocated ({unit}, predicted)")
    ax.set_xlim(0, length)
    ax.set_ylim(0, highest / size * 1.1)
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.xaxis.set_major_formatter("{x:,.10g}")


def _legend(axes: list[Axes], columns: int) -> None:
    """Draw one legend for all panels, beside the last panel of the first line, in the stack's order from the top."""
    handle_by_label: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handle_by_label.setdefault(label, handle)
    names = [kind.replace("optimizer", "optimizer state") for kind in reversed(_ORDER)]
    legend_beside(axes[columns - 1], None, {name: handle_by_label[name] for name in names if name in handle_by_label})
