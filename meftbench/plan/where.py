"""Choosing cells by their fields: `--where method=meft*,batch_size=8`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from meftbench.errors import UserError, unknown
from meftbench.plan.axes import AXES
from meftbench.plan.cell import Cell, value_on

# Keys that are neither axes nor fields of a cell.
_FURTHER_KEYS: dict[str, Callable[[Cell], Any]] = {
    "label": lambda cell: cell.label,
    "cell_id": lambda cell: cell.cell_id,
    "weights": lambda cell: cell.weights,
}


def parse_where(conditions: Sequence[str]) -> Callable[[Cell], bool]:
    """A function that says whether a cell is chosen: whether all `key=glob` parts of at least one condition match it.

    Without conditions, every cell is chosen. `method` matches the method or its label (`lora+checkpoint`), `model`
    likewise.

    Raises UserError: a part has no `=`, or its key is unknown.
    """
    alternatives = [[_key_and_glob(part) for part in _split(condition)] for condition in conditions]
    if not alternatives:
        return lambda cell: True
    return lambda cell: any(all(_matches(cell, key, glob) for key, glob in parts) for parts in alternatives)


def _split(condition: str) -> list[str]:
    """The parts between commas; commas within brackets, as in `meft1(adapter_size=8,beta=0.1)`, do not count."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", condition)]


def _key_and_glob(text: str) -> tuple[str, str]:
    key, equals, glob = text.partition("=")
    if not equals:
        raise UserError("--where", f"{text!r} has no `=`", "write KEY=VALUE, such as method=meft*,batch_size=8")
    known = {*Cell.model_fields, *AXES, *_FURTHER_KEYS}
    if key not in known:
        raise unknown("--where", "key", key, known)
    return key, glob


def _matches(cell: Cell, key: str, glob: str) -> bool:
    if key == "levers":
        values: list[Any] = cell.levers.names()
    elif key in ("method", "model"):
        values = [getattr(cell, key), getattr(cell, f"{key}_label")]
    else:
        values = [_FURTHER_KEYS[key](cell) if key in _FURTHER_KEYS else value_on(cell, key)]
    if key == "learning_rate" and _number(glob) is not None:
        return values == [_number(glob)]  # 5e-4 and 0.0005 are the same
    # A name may contain [ ], which are special in a pattern, so equality is tried first.
    return any(str(value) == glob or fnmatchcase(str(value), glob) for value in values)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
