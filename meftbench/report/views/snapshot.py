"""What a memory snapshot of torch tells: lines for the terminal, and a figure over the trace."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.escapes import single_line
from meftbench.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf")
_NO_LINES = ("no stack", "only torch's own code")  # of meftbench.snapshots.owners
# From the bottom of the stack: what lives longest comes first.
_COLOURS = {
    "before the trace": "#7F7F7F",
    "workspace": "#F0E442",
    "optimizer": "#D55E00",
    "in the trace": "#56B4E9",
    "forward": "#009E73",
    "backward": "#CC79A7",
}


def snapshot_lines(answer: dict[str, Any]) -> list[str]:
    """The answer of meftbench.snapshots.inspection as lines, every number with its unit and how it was obtained."""
    trace, streams = _count(answer["entries"], "entry", "entries"), _count(answer["streams"], "stream")
    return [
        f"{single_line(answer['file'])}, device {answer['device']}",
        f"{trace} in the trace, {_count(answer['segments'], 'segment')} at the end, {streams}, {answer['source']}",
        *_levels(answer),
        *_settings(answer),
        *_categories(answer),
        *_modules(answer),
        *_rests(answer),
        *answer["notes"],
    ]


def _row(name: str, value: str, about: str) -> str:
    return f"  {name:<20}{value:>16}  {about}"


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _levels(answer: dict[str, Any]) -> list[str]:
    at = "before the trace" if answer["peak_at"] < 0 else f"entry {answer['peak_at']:,}"
    source = f"replayed (whole blocks), {at}" if answer["entries"] else f"{answer['source']}, at the end"
    agreeing, allocations = answer["allocations_agreeing"], answer["allocations"]
    texts = [
        _row("peak allocated", format_bytes(answer["peak_allocated_bytes"]), source),
        _row("peak requested", format_bytes(answer["peak_requested_bytes"]), answer["source"]),
        _row("peak reserved", format_bytes(answer["peak_reserved_bytes"]), answer["source"]),
        _row("reserved at the end", format_bytes(answer["reserved_bytes"]), answer["source"]),
        _row("fragmentation", f"{answer['fragmentation']:.1%}", "replayed, at the peak of reserved memory"),
    ]
    if allocations:
        whose = "as torch chose them" if answer["source"] == "measured" else "as predicted by the same rules"
        texts.append(_row("addresses", f"{agreeing:,} of {allocations:,}", f"{whose}, replayed"))
    if answer["first_difference"] is not None:
        texts.append(f"  the rules first differ from the device at entry {answer['first_difference']:,}")
    return texts


def _settings(answer: dict[str, Any]) -> list[str]:
    if not answer["entries"]:
        return []
    limit = "" if answer["capacity_bytes"] is None else f", of {format_bytes(answer['capacity_bytes'])}"
    texts = [f"reserved with other settings, peak and at the end{limit}, replayed"]
    for row in answer["other_settings"]:
        conf = row["alloc_conf"]
        name = "as recorded" if conf is None else conf or "torch's defaults"
        ends = [_count(row["retries"], "retry", "retries")] if row["retries"] else []
        ends += [] if row["oom_at"] is None else [f"out of memory at entry {row['oom_at']:,}"]
        ends += ["without effect unless --memory is given"] if row["collects"] is False else []
        about = f": {', '.join(ends)}" if ends else ""
        if row["oom_at"] == -1:
            texts.append(f"  {'does not fit':>24}  {name}: what was in use before the trace is more than that")
            continue
        texts.append(
            f"  {format_bytes(row['peak_reserved_bytes']):>12}{format_bytes(row['reserved_bytes']):>12}  {name}{about}"
        )
    return texts


def _categories(answer: dict[str, Any]) -> list[str]:
    if not answer["by_category"]:
        return []
    return [
        f"alive at the peak: {_count(answer['blocks_at_peak'], 'block')}, replayed; what they are, by simple rules",
        *(
            _row(row["name"], format_bytes(row["bytes"]), f"in {_count(row['blocks'], 'block')}")
            for row in answer["by_category"]
        ),
    ]


def _modules(answer: dict[str, Any]) -> list[str]:
    if not answer["stacks"]:
        return ["no stacks are in the snapshot, so nothing is said of modules"]
    if all(row["name"] in _NO_LINES for row in answer["by_module"]):
        return ["no stack of what is alive at the peak has a line of Python outside of torch"]
    texts = ["alive at the peak, replayed, by line of code: of the innermost forward, if any"]
    texts += [f"  {format_bytes(row['bytes']):>12}  {row['name']}" for row in answer["by_module"]]
    others = answer["other_modules"]
    if others["modules"]:
        texts.append(f"  {format_bytes(others['bytes']):>12}  in {_count(others['modules'], 'other')}")
    return texts


def _rests(answer: dict[str, Any]) -> list[str]:
    whole = format_bytes(answer["unused_in_blocks_bytes"])
    if not answer["unused_in_blocks"]:
        return []
    texts = [f"block minus request at the peak: {whole} in all, replayed; the largest"]
    for row in answer["unused_in_blocks"]:
        of = f"{_count(row['blocks'], 'request')} for {format_bytes(row['requested_bytes'])}"
        where = "" if row["where"] in _NO_LINES else f", {row['where']}"
        texts.append(f"  {format_bytes(row['unused_bytes']):>12}  of {of}, {row['category']}{where}")
    return texts


def plot_snapshot(answer: dict[str, Any], ax: Axes) -> None:
    """Draw allocated bytes over the entries of the trace, stacked by category, and reserved bytes as a line."""
    from meftbench.report.figures.plots import legend_beside, unit_of

    timeline = answer["timeline"]
    size, unit = unit_of([answer["peak_reserved_bytes"]])
    shown = [name for name in _COLOURS if any(timeline["levels"][name])]
    ax.stackplot(
        timeline["at"],
        [[level / size for level in timeline["levels"][name]] for name in shown],
        labels=shown,
        colors=[_COLOURS[name] for name in shown],
        step="post",
        linewidth=0,
    )
    reserved = [level / size for level in timeline["reserved"]]
    name = f"reserved, {answer['source']}"
    ax.plot(timeline["at"], reserved, drawstyle="steps-post", color="black", linewidth=1.0, label=name)
    peak = answer["peak_allocated_bytes"] / size
    ax.axhline(peak, color="#999999", linewidth=0.8, linestyle="--")
    ax.annotate(f"peak {peak:,.1f}", (1.0, peak), xycoords=("axes fraction", "data"), xytext=(-2, 2), ha="right",
                textcoords="offset points", fontsize=8)  # fmt: skip
    ax.set(xlabel="entries of the trace", ylabel=f"allocated ({unit}, replayed)")
    ax.set_xlim(0, max(timeline["at"][-1], 1))
    ax.set_ylim(0, max([*reserved, peak]) * 1.1 or 1)
    ax.yaxis.set_major_formatter("{x:,.10g}")
    ax.xaxis.set_major_formatter("{x:,.10g}")
    handles, labels = ax.get_legend_handles_labels()
    legend_beside(ax, None, dict(reversed(list(zip(labels, handles, strict=True)))))


def snapshot_picture(answer: dict[str, Any], kind: str) -> bytes:
    """The figure as "png", "svg" or "pdf", the same on every day."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    dates = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
    salt = "snapshot"
    with (
        rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}),
        rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}),
    ):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        plot_snapshot(answer, figure.add_subplot())
        title = f"Memory over the trace: {single_line(Path(answer['file']).name)}, device {answer['device']}"
        figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=10, fontweight="bold", wrap=True)
        figure.savefig(stream, format=kind, dpi=130, metadata=dates[kind])
    return stream.getvalue()
