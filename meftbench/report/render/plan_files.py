"""The folder of `meftbench plan --out`: plan.md, plan.csv, plots, and a suite that measures the answer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.errors import UserError
from meftbench.plan.ranking import method_of
from meftbench.records.store import replace_file
from meftbench.report.figures.plots import legend_beside
from meftbench.report.figures.style import colour
from meftbench.report.views.commands import suite_of
from meftbench.report.views.plan import map_label, markdown, name_of
from meftbench.report.views.plan_answer import point_of
from meftbench.units import GiB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_KINDS = ("png", "svg")


def write_plan(answer: Row, folder: Path) -> list[str]:
    """Write the files, and return their names. Raises UserError where `folder` cannot be written.

    plan.md, plan.csv (a line for each row), plan.png and plan.svg (memory against time or arithmetic); where there is
    an answer, answer.yaml, a suite of it alone; where it was asked for, map.png and map.svg.
    """
    import pandas as pd
    import yaml

    left_out = ("breakdown", "parts")  # the first has a column for each category, the second is in the label
    rows = [{k: v for k, v in row.items() if k not in left_out} | _breakdown(row) for row in answer["rows"]]
    files: dict[str, bytes] = {
        "plan.md": markdown(answer).encode(),
        "plan.csv": pd.DataFrame(rows).assign(source="predicted").to_csv(index=False).encode(),
    }
    if answer["fastest"] is not None:
        files["answer.yaml"] = yaml.safe_dump(suite_of(answer["fastest"], answer), sort_keys=False).encode()
        files |= {f"plan.{kind}": picture(answer, kind) for kind in _KINDS}
    if answer["map"]:
        files |= {f"map.{kind}": map_picture(answer, kind) for kind in _KINDS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror})", "choose another --out") from None
    return list(files)


def _breakdown(row: Row) -> dict[str, int]:
    return {f"breakdown_{name}": size for name, size in (row.get("breakdown") or {}).items()}


def picture(answer: Row, kind: str) -> bytes:
    """Memory against time, or against arithmetic, as PNG or SVG."""

    def draw(figure: Figure) -> None:
        plot_plan(answer, figure.add_subplot())
        heading = f"{answer['model']} at {answer['sequence_length']:,} tokens, by the rules of {answer['device']}"
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")

    return _saved(draw, (10.0, 5.2), kind)


def map_picture(answer: Row, kind: str) -> bytes:
    """The heat map of batch and length as PNG or SVG."""

    def draw(figure: Figure) -> None:
        plot_map(answer, figure.add_subplot())
        figure.suptitle(f"{map_label(answer)}, memory predicted", x=0.01, ha="left", fontsize=11, fontweight="bold")

    return _saved(draw, (8.0, 5.2), kind)


def _saved(draw: Any, size: tuple[float, float], kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "plan", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()


def plot_plan(answer: Row, ax: Axes) -> None:
    """Memory (GiB) against speed, a point for each row that fits; a line joins the Pareto set, the answer has a ring.

    Memory is that at micro-batch 1, and speed that at the largest micro-batch that fits: predicted tokens per second;
    where no time is predicted, arithmetic per token, on an axis that is turned so that right is better in both.
    """
    timed = answer["has_time"]
    rows = [
        row
        for row in answer["rows"]
        if row["capacity_index"] == 0 and row["fits"] and row["has_backward"] and not row["only_explains"]
    ]
    places = {id(row): (point_of(row, timed)[0] / GiB, abs(point_of(row, timed)[1])) for row in rows}
    for method in dict.fromkeys(method_of(row) for row in rows):
        points = [places[id(row)] for row in rows if method_of(row) == method]
        ax.plot([y for _, y in points], [x for x, _ in points], "o", color=colour(method), markersize=6, label=method)
    frontier = sorted((places[id(row)] for row in rows if row["on_frontier"]), key=lambda place: place[0])
    ax.plot([y for _, y in frontier], [x for x, _ in frontier], color="#888888", linewidth=1.2, zorder=0,
            label="Pareto set")  # fmt: skip
    best = answer["fastest"]
    if best is not None and best["has_backward"]:
        memory, speed = point_of(best, timed)
        ax.plot([abs(speed)], [memory / GiB], "o", color="black", fillstyle="none", markersize=13,
                label=f"the answer:\n{name_of(best, answer)}")  # fmt: skip
    card = answer["cards"][0]
    ax.axhline(card / GiB, color="#D55E00", linewidth=1, linestyle="--", label=f"the card, {format_bytes(card)}")
    ax.set_ylim(0, 1.05 * max([card / GiB, *(memory for memory, _ in places.values())]))
    ax.set_ylabel("memory at micro-batch 1 (GiB, predicted)")
    if timed:
        ax.set_xlabel("speed at the largest micro-batch that fits (tokens/s, predicted)")
        ax.xaxis.set_major_formatter("{x:,.10g}")
    else:
        ax.set_xlabel("operations a token over the least of all candidates (counted)")
        ax.invert_xaxis()
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)


def plot_map(answer: Row, ax: Axes) -> None:
    """Memory (GiB) by batch and length as a heat map with its numbers; what does not fit the card is in brackets."""
    from matplotlib.colors import LogNorm

    grid = answer["map"]
    values = [[nan if size is None else size / GiB for size in row] for row in grid["process_device_bytes"]]
    sizes_GiB = [size for row in values for size in row if size == size]
    smallest, largest = min(sizes_GiB, default=1.0), max(sizes_GiB, default=2.0)
    norm = LogNorm(smallest, max(largest, 1.01 * smallest))
    image = ax.imshow(values, cmap="viridis", aspect="auto", origin="lower", norm=norm)
    ax.set_xticks(range(len(grid["lengths"])), [f"{length:,}" for length in grid["lengths"]])
    ax.set_yticks(range(len(grid["batch_sizes"])), [f"{batch:,}" for batch in grid["batch_sizes"]])
    for row, sizes in enumerate(values):
        for column, size in enumerate(sizes):
            text = f"{size:,.1f}" if size * GiB <= answer["cards"][0] else f"({size:,.1f})"
            ax.text(column, row, text if size == size else "-", ha="center", va="center", fontsize=8,
                    color="black" if size > (smallest * largest**2) ** (1 / 3) else "white")  # fmt: skip
    ax.set(xlabel="sequence length (tokens)", ylabel="batch (samples)")
    ax.set_title(f"GiB; in brackets: does not fit {format_bytes(answer['cards'][0])}", loc="left", fontsize=9)
    ax.figure.colorbar(image, ax=ax, label="memory of the process (GiB, logarithmic)")
