"""Runs as one pandas frame with a row per cell, and functions that tables and plots share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.labels import Part, joined
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import METRICS
from meftbench.escapes import spreadsheet_text
from meftbench.plan.axes import SETTINGS, SHAPE
from meftbench.records.outcome import outcomes
from meftbench.records.store import Run, write_whole
from meftbench.report.frame_columns import cell_columns, metric_columns, shown

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table

# Cells that differ in one of these differ in more than method and shape, and are not ranked with each other.
SETTING = ("run", "model", "device", *(name for name in SETTINGS if name not in ("model", "device")), "training")


def frame_of(runs: Run | Sequence[Run], metrics: Collection[str] = METRICS) -> DataFrame:
    """One row per cell, in the order of the runs and, within a run, of their writing.

    Columns: run (name, with the folder where two share it), cell_id, label, model, method (as labelled, with levers
    and settings), parts (the same as fields: a catalogue.labels.Part for the method and for each lever), levers (their
    labels, joined by `+`), the fields of the cell, of a reversible method arithmetic, side_bits, coupling and output,
    status, detail, repeats, wall_s; and for each metric that any cell has NAME (in the unit of its Kind; missing where
    absent), NAME_low, NAME_high, NAME_source. Metrics that are lists or words are in NAME as recorded. Repeats are
    taken together as in `Outcome.figure`: median where measured.

    metrics: the others have no columns, which saves time where a run has thousands of cells.
    """
    from pandas import DataFrame

    listed = [runs] if isinstance(runs, Run) else list(runs)
    named = [(name, outcome) for name, run in zip(run_names(listed), listed, strict=True) for outcome in outcomes(run)]
    cells = [outcome for _, outcome in named]
    columns = cell_columns([name for name, _ in named], cells)
    columns |= metric_columns(cells, [name for name in METRICS if name in metrics])
    # A plot or table may ask for these of any run, also of one in which every cell failed.
    always = [f"{name}{part}" for name in _HEADLINE for part in ("", "_low", "_high", "_source")]
    columns |= {name: [None] * len(cells) for name in always if name not in columns}
    # As objects: None (not taken) and nan (what was taken) are different answers, and counts stay whole numbers.
    return DataFrame({name: shown(column) for name, column in columns.items()}, dtype=object)


_HEADLINE = (
    "activation_peak_bytes",
    "peak_allocated_bytes",
    "step_time_s",
    "tokens_per_s",
    "reconstruction_rel",
    "reconstruction_rel_max",
    "gradient_rel_max",
    "starting_point_shift",
    "parameters_total",
    "parameters_trainable",
)


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, none twice: that of its suite, with the folder's name where suites share theirs."""
    suite_names = [run.name for run in runs]
    names = [
        name if suite_names.count(name) == 1 else f"{name} ({run.path.name or run.path})"
        for name, run in zip(suite_names, runs, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} #{index}" for index, name in enumerate(names, start=1)]


@dataclass(frozen=True)
class Group:
    """Cells that differ in method and shape alone, so that they may be ranked. title: what they share."""

    title: str
    frame: DataFrame


def groups(frame: DataFrame) -> list[Group]:
    """The cells grouped by every setting but method and shape; the titles say in what the groups differ, and always in
    how many ranks a step was taken, and how these shared it."""
    all_groups = []
    differing = [name for name in SETTING if frame[name].nunique(dropna=False) > 1]
    for values, rows in frame.groupby(list(SETTING), dropna=False, sort=False):
        shared: dict[str, Any] = dict(zip(SETTING, values, strict=True))
        told = [name for name in SETTING if name in differing or (name in _RANKS and shared["world_size"] > 1)]
        parts = [str(shared["model"]), *(setting_text(name, shared[name]) for name in told if name != "model")]
        all_groups.append(Group(", ".join(parts), rows))
    return all_groups


_RANKS = ("world_size", "parallelism")


def setting_text(name: str, value: object) -> str:
    """A setting as titles show it: `cuda`, `head multiple_choice`, `2 ranks`, `fsdp2`."""
    if name == "world_size":
        return "one process" if value == 1 else f"{value} ranks"
    missing = value is None or value != value
    if name == "parallelism":
        return "no parallelism" if missing else str(value)
    text = "default" if missing else str(value)
    return text if name in ("run", "device", "precision") else f"{name.removesuffix('_requested')} {text}"


def shape_text(batch: int, micro_batch: int, length: int) -> str:
    """`batch 8 × 128 tokens`, with the micro-batch where it is smaller."""
    micro = f" (micro-batch {micro_batch})" if micro_batch != batch else ""
    return f"batch {batch}{micro} × {length} tokens"


def share_of_full(frame: DataFrame, metric: str = "activation_peak_bytes") -> dict[str, float]:
    """cell_id to the metric's share of that of plain `full` at the same shape and setting, where both are known."""
    columns = [[None if value != value else value for value in frame[name]] for name in (*SETTING, *SHAPE)]
    alike = list(zip(*columns, strict=True))  # what each cell has to share with `full`
    of_full: dict[tuple[Any, ...], float] = {}
    for key, method, value in zip(alike, frame["method"], frame[metric], strict=True):
        if method == "full" and value is not None and value == value:
            of_full.setdefault(key, float(value))
    return {
        str(cell_id): float(value) / of_full[key]
        for key, cell_id, value in zip(alike, frame["cell_id"], frame[metric], strict=True)
        if value is not None and of_full.get(key)
    }


def sources(frame: DataFrame, metric: str) -> list[str]:
    """The sources of a metric's values that occur in the frame, of measured, counted and predicted."""
    if metric not in frame:  # the records are older than the metric
        return []
    pairs = zip(frame[metric], frame[f"{metric}_source"], strict=True)
    return sorted({source for value, source in pairs if value is not None})


# Above this relative error a gradient counts as wrong. Rounding in bfloat16, in which models are trained, stays well
# below it.
WRONG_GRADIENT = 0.1
_WRONG_RECONSTRUCTION = 0.01


def wrong_gradient(row: Mapping[str, Any]) -> str | None:
    """`gradient is wrong by 308 %`, or `by 8e23 times its size`, where a cell's gradient is not that of its loss.

    None: it is right, or not known. A cell without a gradient error is judged by its reconstruction error, which may
    be 1 % at most.
    """
    error, reconstruction = row.get("gradient_rel_max"), row.get("reconstruction_rel_max")
    if error is not None:
        if error <= WRONG_GRADIENT:
            return None
        if not math.isfinite(error):
            return "gradient is not finite"
        if error < 100:
            return "gradient is wrong by " + f"{error:.0%}".replace("%", " %")
        times = f"{error:,.0f}" if error < 100_000 else f"{error:.0e}".replace("e+", "e")
        return f"gradient is wrong by {times} times its size"
    if reconstruction is None or reconstruction <= _WRONG_RECONSTRUCTION:
        return None
    return "what backward recomputes is wrong"


def taken(frame: DataFrame, metric: str) -> bool:
    """Whether any cell has a value of the metric, NaN included. Older runs may lack the metric altogether."""
    return metric in frame and any(value is not None for value in frame[metric])


def write_csv(frame: DataFrame, file: Path) -> None:
    """`as_csv`, as a file. Raises UserError where it cannot be written."""
    write_whole(file, as_csv(frame))


def as_csv(frame: DataFrame) -> str:
    """The table as CSV: the unit in each metric's heading, its source in a column beside it.

    What is alive at the peak, a table of its own in every cell, is left to the records, as are the parts of a method,
    which its label and other columns have. A text that a spreadsheet would
    take for a formula begins with an apostrophe.
    """
    left_to_records = ["parts", "peak_buffers", "peak_buffers_source", "timeline", "timeline_source"]
    frame = frame.drop(columns=left_to_records, errors="ignore")
    headings = {name: f"{name} [{METRICS[name].unit}]" for name in METRICS if name in frame}

    def field(value: Any) -> Any:
        if isinstance(value, str):
            return spreadsheet_text(value)
        # A measured nan is written as a value: an empty field is a number that was not taken.
        return "NaN" if value != value else value

    return str(frame.map(field).rename(columns=headings).to_csv(index=False))


def methods_in_order(frame: DataFrame) -> list[str]:
    """Method labels in the order of the catalogue's methods; those of one method in the order of the frame."""
    families = list(METHODS)
    first = dict(zip(frame["method"], frame["method_name"], strict=True))

    def place(method: str) -> int:
        return families.index(first[method]) if first[method] in families else len(families)

    return sorted(dict.fromkeys(frame["method"]), key=place)


def parts_by_method(frame: DataFrame) -> dict[str, tuple[Part, ...]]:
    """The method and its levers as fields, by the label of the method."""
    return dict(zip(frame["method"], frame["parts"], strict=True))


def without_side_bits(parts: Sequence[Part]) -> str:
    """The label of a method without its side bits: the same for all cells of one sweep over them."""
    method, *levers = parts
    return joined([method.without("side_bits"), *levers])


class Row(dict[str, Any]):
    """A row of a table, by column. A metric without a column, since no record has it, is None.

    Raises KeyError: for any other missing column.
    """

    def __missing__(self, column: str) -> None:
        if column.removesuffix("_source").removesuffix("_low").removesuffix("_high") not in METRICS:
            raise KeyError(column)


def rows_of(frame: DataFrame) -> Iterator[dict[str, Any]]:
    """The rows as mappings from column to value."""
    names = [str(name) for name in frame.columns]
    # Not `to_dict`, which converts every value anew: a frame of results holds objects.
    for values in frame.to_numpy(dtype=object):
        yield Row(zip(names, values, strict=True))


def left_out(widths: Mapping[int, int], omittable: Mapping[str, int], room: int) -> list[str]:
    """Names of columns to leave out so that a table fits into `room` characters, in the order of `omittable`.

    widths: characters of each column by index, with the space beside it.  omittable: name of a column to its index.
    """
    remaining, names = dict(widths), []
    for name, index in omittable.items():
        if index in remaining and sum(remaining.values()) > room:
            del remaining[index]
            names.append(name)
    return names


NARROWEST = 8  # characters that the method column has at least, whatever the width


def print_table(table: Table, out: Console, least: int) -> None:
    """Print a table that needs `least` characters.

    A narrower terminal then wraps the lines; left to itself, rich would drop columns or cut numbers.
    """
    before = out.width
    out.width = max(before, least)
    try:
        out.print(table)
    finally:
        out.width = before
