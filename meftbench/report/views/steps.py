"""The table of steps: a row for each cell, the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.labels import Part, joined
from meftbench.report.columns import Column, View, columns_of
from meftbench.report.results import (
    SETTING,
    groups,
    methods_in_order,
    rows_of,
    share_of_full,
    taken,
    wrong_gradient,
)
from meftbench.units import MiB

if TYPE_CHECKING:
    from pandas import DataFrame

SETTINGS = tuple(name for name in SETTING if name not in ("run", "model"))
SHARE = "share_of_full"


@dataclass(frozen=True)
class Number:
    """A number of a table. text: as it is shown.  value: for sorting; None: it was not taken.  source: measured,
    counted or predicted; "" where there is no value."""

    text: str
    value: float | None
    source: str


@dataclass(frozen=True)
class StepRow:
    """A cell in the table of steps.

    cell: its row of the frame.  name: of the method, with its levers.  parameters: the method's settings, in words.
    batch: with the micro-batch where that is smaller.  settings: those in which cells of the table may differ, by
    name.  numbers: by metric, and SHARE.  wrong: why its gradients are no gradients of its loss, or "".
    """

    cell: dict[str, Any]
    name: str
    parameters: tuple[str, ...]
    batch: str
    settings: dict[str, str]
    numbers: dict[str, Number]
    wrong: str


@dataclass(frozen=True)
class StepTable:
    """columns: in order; the share of `full` stands beside the activation memory.  differing: settings in which the
    cells differ.  shared: the settings that all have, in words.  groups: titles of the cells that may be ranked.
    """

    columns: tuple[Column, ...]
    rows: tuple[StepRow, ...]
    differing: tuple[str, ...]
    shared: str
    groups: tuple[str, ...]
    several_models: bool


def step_table(frame: DataFrame, view: View) -> StepTable:
    """The cells of a frame, those of one shape and setting together, as these are compared; of these, methods in the
    order of the catalogue."""
    columns = tuple(c for c in columns_of(view) if not c.optional or taken(frame, c.metric))
    if not len(frame):
        return StepTable(columns, (), (), "", (), several_models=False)
    differing = tuple(name for name in SETTINGS if frame[name].nunique(dropna=False) > 1)
    shares = share_of_full(frame)
    rows = [_row(cell, columns, shares) for cell in rows_of(frame)]
    return StepTable(
        columns,
        tuple(_in_order(rows, methods_in_order(frame))),
        differing,
        _shared(frame, differing),
        tuple(group.title for group in groups(frame)),
        several_models=frame["model"].nunique() > 1,
    )


def _in_order(rows: Sequence[StepRow], methods: Sequence[str]) -> list[StepRow]:
    place = {method: number for number, method in enumerate(methods)}
    first_seen: dict[tuple[Any, ...], int] = {}

    def key(row: StepRow) -> tuple[Any, ...]:
        cell = row.cell
        setting = tuple(str(cell[name]) for name in SETTING)
        group = first_seen.setdefault(setting, len(first_seen))
        shape = (cell["batch_size"], -cell["micro_batch_size"], cell["sequence_length"])
        return (group, *shape, place[cell["method"]])

    return sorted(rows, key=key)


def _row(cell: dict[str, Any], columns: Sequence[Column], shares: dict[str, float]) -> StepRow:
    method, *levers = cell["parts"]
    name = joined([Part(method.name, {}), *levers])
    micro = f" (mb {cell['micro_batch_size']})" if cell["micro_batch_size"] != cell["batch_size"] else ""
    numbers = {}
    for column in columns:
        value = cell.get(column.metric)
        source = "" if value is None else cell[f"{column.metric}_source"]
        numbers[column.metric] = Number(column.text(value, MiB), value, source)
    share = shares.get(cell["cell_id"])
    numbers[SHARE] = Number("" if share is None else f"{share:.1%}", share, "")
    settings = {name: _setting(name, cell[name]) for name in SETTINGS}
    wrong = wrong_gradient(cell) or ""
    return StepRow(cell, name, tuple(method.texts()), f"{cell['batch_size']}{micro}", settings, numbers, wrong)


def _setting(name: str, value: Any) -> str:
    """A setting as a row shows it. One process has no parallelism; of others None is left to the program."""
    if value is None:
        return "none" if name == "parallelism" else "default"
    return str(value)


def _shared(frame: DataFrame, differing: Sequence[str]) -> str:
    """The settings that all cells have in common, stated once instead of in every row."""
    first = next(rows_of(frame))
    parts = [str(first["model"])] if frame["model"].nunique() == 1 else []
    parts += [
        f"{setting_name(name)} {first[name]}"
        for name in SETTINGS
        if name not in differing and not _goes_without_saying(name, first[name])
    ]
    return ", ".join(parts)


def _goes_without_saying(name: str, value: Any) -> bool:
    return value is None or value is False or (name, value) == ("world_size", 1)


def setting_name(name: str) -> str:
    return name.removesuffix("_requested").replace("_", " ")
