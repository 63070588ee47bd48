"""The cells of a run by name: which of them a word on the command line means, and the list to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from meftbench.errors import NOTHING_MATCHED, UserError
from meftbench.escapes import single_line
from meftbench.plan.budgets import glob
from meftbench.records.outcome import Outcome, collect
from meftbench.records.record import Record
from meftbench.records.store import Run

SHOWN = 20  # cells that a list of those that are meant has at most


def find_records(run: Run, selector: str) -> list[Record]:
    """The records of the cells that `selector` names.

    selector: a cell_id or its start; a label; a label without the model (`lora+checkpoint/b4/s64`), or its beginning up
    to a slash (`lora+checkpoint`); or a glob on the label.
    A cell whose whole label or cell_id it is comes before others.
    Raises UserError (exit 5) where there is none, with the nearest labels.
    """
    exact = [record for record in run.records if selector in (record.label, record.cell_id)]
    pattern = glob(selector)
    matching = exact or [
        record for record in run.records if _is_meant(record, selector) or pattern.fullmatch(record.label)
    ]
    if not matching:
        known = {name for record in run.records for name in (record.label, _without_model(record))}
        nearest = get_close_matches(selector, sorted(known), n=3, cutoff=0.4)
        advice = f"did you mean {', '.join(map(repr, nearest))}?" if nearest else f"{_command(run)} lists its cells"
        raise UserError(str(run.path), f"no cell {selector!r}", advice, NOTHING_MATCHED)
    return matching


def _is_meant(record: Record, selector: str) -> bool:
    names = (record.label, _without_model(record))
    return record.cell_id.startswith(selector) or any(f"{name}/".startswith(f"{selector}/") for name in names)


def _without_model(record: Record) -> str:
    return record.label.removeprefix(f"{record.model_label}/")


def _command(run: Run) -> str:
    return f"`meftbench show {run.path} --cells`"


def several(run: Run, selector: str, found: Sequence[Record]) -> tuple[list[str], UserError] | None:
    """Where `selector`, which is no glob, names several cells: lines that list them, and the error (exit 5).

    None where it names one cell, or is a glob and may name many.
    """
    cells = collect(found)
    if len(cells) == 1 or any(sign in selector for sign in "*?"):
        return None
    lines = lines_of(cells[:SHOWN])
    if len(cells) > SHOWN:
        lines.append(f"and {len(cells) - SHOWN:,} more ({_command(run)} lists all)")
    as_glob = f"*/{selector}/*"
    of_all = all(glob(as_glob).fullmatch(cell.label) for cell in cells)
    cure = "name one by its cell_id or label" + (f", or all of them by a glob: '{as_glob}'" if of_all else "")
    return lines, UserError(str(run.path), f"{len(cells)} cells are {selector!r}", cure, NOTHING_MATCHED)


def lines_of(cells: Sequence[Outcome]) -> list[str]:
    """A line for each cell: cell_id, status and label, below each other."""
    width = max((len(cell.status) for cell in cells), default=0)
    return [f"{single_line(cell.cell_id)}  {cell.status:<{width}}  {single_line(cell.label)}" for cell in cells]


def facts_of(cell: Outcome) -> dict[str, Any]:
    """The same as JSON has it."""
    return {"label": cell.label, "cell_id": cell.cell_id, "status": cell.status}


def refuse_empty(run: Run) -> None:
    """Raises UserError (exit 5): no cell of the run has finished."""
    if not run.records:
        raise UserError(
            str(run.path), "no cell has finished", "`meftbench run` with --resume takes it up", NOTHING_MATCHED
        )
