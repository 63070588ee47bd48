"""The figure of one step over time: what is alive, stacked by category, with the phases marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meftbench.report.figures import Picture
from meftbench.report.plots import CATEGORY, legend_beside, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def timeline_picture(answer: dict[str, Any], name: str = "timeline") -> Picture:
    """answer: what meftbench.prediction.timeline.export gave."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    title = f"Memory during a step: {answer['label']}"
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        plot_timeline(answer, figure.add_subplot())
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", wrap=True)
    size, unit = unit_of([answer["peak_allocated_bytes"]])
    phases = ", ".join(phase for phase, _ in answer["timeline"]["phases"])
    alt = (
        f"{title} on {answer['device']}, predicted; peak {answer['peak_allocated_bytes'] / size:,.1f} {unit}; {phases}"
    )
    return Picture(name, title, alt, figure)


def plot_timeline(answer: dict[str, Any], ax: Axes) -> None:
    """Live bytes over allocations and frees, stacked; what lives longest is at the bottom."""
    told = answer["timeline"]
    size, unit = unit_of([answer["peak_allocated_bytes"]])
    shades = {name.removesuffix("_bytes"): shade for name, shade in CATEGORY.items()}
    order = ("parameters", "buffers", "inputs", "other", "optimizer", "gradients", "activations", "temporaries")
    shown = [kind for kind in order if any(told["levels"][kind])]
    ax.stackplot(
        told["at"],
        [[level / size for level in told["levels"][kind]] for kind in shown],
        labels=["optimizer state" if kind == "optimizer" else kind for kind in shown],
        colors=[shades[kind] for kind in shown],
        step="post",
        linewidth=0,
    )
    peak = answer["peak_allocated_bytes"] / size
    ax.axhline(peak, color="#999999", linewidth=0.8, linestyle="--")
    ax.annotate(f"peak {peak:,.1f}", (0, peak), xytext=(2, 2), textcoords="offset points", fontsize=8)
    for phase, place in told["phases"]:
        if phase != "end":
            ax.axvline(place, color="black", linewidth=0.6, linestyle=":")
            ax.annotate(phase, (place, 1.0), xycoords=("data", "axes fraction"), xytext=(2, 2),
                        textcoords="offset points", fontsize=8, va="bottom")  # fmt: skip
    ax.set(xlabel="allocations and frees of the step", ylabel=f"allocated ({unit}, predicted)")
    ax.set_xlim(0, max(told["at"], default=1))
    ax.set_ylim(0, peak * 1.08)
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.xaxis.set_major_formatter("{x:,.10g}")
    legend_beside(ax)
