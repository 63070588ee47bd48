"""Choosing cells by their fields: `--where method=meft*,batch_size=8`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from meftbench.errors import UserError, unknown
from meftbench.plan.axes import AXES
from meftbench.plan.cell import Cell, value_on

# Names that are not fields but say what people mean.
_ALSO: dict[str, Callable[[Cell], Any]] = {
    "label": lambda cell: cell.label,
    "cell_id": lambda cell: cell.cell_id,
    "weights": lambda cell: cell.weights,
}


def parse_where(conditions: Sequence[str]) -> Callable[[Cell], bool]:
    """Whether a cell is chosen: by any of `conditions`, all of whose `key=glob` parts must match it.

    No condition chooses every cell. `method` matches the method or its label (`lora+checkpoint`), `model` likewise.

    Raises UserError for a part without `=` and for a key that is no field of a cell.
    """
    alternatives = [[_part(part) for part in _split(condition)] for condition in conditions]
    if not alternatives:
        return lambda cell: True
    return lambda cell: any(all(_matches(cell, key, glob) for key, glob in parts) for parts in alternatives)


def _split(condition: str) -> list[str]:
    """Parts at commas, but not within the brackets of `meft1(adapter_size=8,beta=0.1)`."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", condition)]


def _part(text: str) -> tuple[str, str]:
    key, equals, glob = text.partition("=")
    if not equals:
        raise UserError("--where", f"{text!r} has no `=`", "write KEY=VALUE, such as method=meft*,batch_size=8")
    known = {*Cell.model_fields, *AXES, *_ALSO}
    if key not in known:
        raise unknown("--where", "key", key, known)
    return key, glob


def _matches(cell: Cell, key: str, glob: str) -> bool:
    if key == "levers":
        values: list[Any] = cell.levers.names()
    elif key in ("method", "model"):
        values = [getattr(cell, key), getattr(cell, f"{key}_label")]
    else:
        values = [_ALSO[key](cell) if key in _ALSO else value_on(cell, key)]
    if key == "learning_rate" and _number(glob) is not None:
        return values == [_number(glob)]  # 5e-4 and 0.0005 are the same
    # A name with brackets is meant as it stands before it is meant as a pattern.
    return any(str(value) == glob or fnmatchcase(str(value), glob) for value in values)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
