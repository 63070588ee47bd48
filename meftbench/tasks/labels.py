"""Labels of a task: which classes there are, and which of them a row's label names.

A label is looked up among the names as the text that it is. Only where the names are words may a number be the place
of one, counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.task import Task
from meftbench.errors import UserError
from meftbench.tasks.text_files import TextTable

if TYPE_CHECKING:
    from datasets import Dataset

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")
ALIKE = "write them alike"


def as_written(value: Any) -> str:
    """A value as its file has it: a string as it is, a number of a JSON file by its own digits, truth values as JSON
    writes them."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(getattr(value, "written", value))


def whole_number(value: Any) -> int | None:
    """The whole number that a value is or spells (1, 1.0, "1", "1.0"); None: none, or a truth value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return int(value) if value == value // 1 else None
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.split(".")[0])
    return None


def check_columns(where: str, needed: Iterable[str], raw: Dataset | TextTable) -> None:
    """Raises UserError where a column is not there."""
    for column in needed:
        if column not in raw.column_names:
            there = ", ".join(raw.column_names) or "none"
            raise UserError(where, f"has no column {column!r}", f"its columns are {there}: rename one")


def names_of_ids(raw: Dataset | TextTable, column: str) -> list[str] | None:
    """The names by id where the file itself has them (a ClassLabel of `datasets`)."""
    return None if isinstance(raw, TextTable) else getattr(raw.features[column], "names", None)


def name_of_id(value: Any, names: Sequence[str]) -> Any:
    """The name that an id stands for; an id without a name as it is."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def label_kind(where: str, task: Task, raw: Dataset | TextTable | None, like: str | None = None) -> str | None:
    """What the labels of a classification are: "a text", "a number", "a truth value"; None: the file does not say (csv,
    tsv), or has names for them.

    like: what those of the training rows are. Raises UserError at the first row that is otherwise.
    """
    if raw is None or task.kind != "classification" or task.label not in raw.column_names:
        return None
    if (isinstance(raw, TextTable) and not raw.typed) or names_of_ids(raw, task.label) is not None:
        return None
    first = like
    for number, value in enumerate(_column(raw, task.label), 1):
        if value is None or isinstance(value, list | dict | bytes):
            continue  # said where the row is read
        kind = "a text" if isinstance(value, str) else "a truth value" if isinstance(value, bool) else "a number"
        first = first or kind
        if kind != first:
            others = "those of the training rows are" if like else "that of rows before is"
            raise UserError(f"{where}, row {number}", f"label {value!r} is {kind}, {others} {first}", ALIKE)
    return first


def class_names(where: str, task: Task, train: Dataset | TextTable | None) -> tuple[str, ...] | None:
    """Names of the classes by id: the task's, or those that the training rows have; None: it has no classes.

    Raises UserError: no column of labels, a blank label, two that differ by blanks or capitals alone, whole numbers
    that are not 0, 1, 2 ..., or only one class.
    """
    if task.kind in ("regression", "choices") or task.labels is not None:
        return task.labels
    assert train is not None
    check_columns(where, [task.label], train)
    named = names_of_ids(train, task.label)
    if named is not None:
        return tuple(named)
    first_row: dict[Any, int] = {}  # of each label
    for number, value in enumerate(_column(train, task.label), 1):
        first_row.setdefault(_not_blank(f"{where}, row {number}", value), number)
    numbers = [whole_number(value) for value in first_row]
    as_texts = isinstance(train, TextTable) and not train.typed
    if first_row and (as_texts or not any(isinstance(value, str) for value in first_row)) and None not in numbers:
        names = _counted(where, task, sorted(number for number in numbers if number is not None))
    elif all(isinstance(value, bool) for value in first_row):
        names = ("false", "true")
    else:
        names = tuple(sorted({as_written(value) for value in first_row}))
        _check_apart(where, {as_written(value): row for value, row in first_row.items()})
    if len(first_row) < 2:
        raise UserError(where, f"column {task.label!r} has one class only", "train on two or more")
    return names


def class_of(where: str, value: Any, labels: Sequence[str]) -> int:
    """The class that a row's label names. Raises UserError: it is blank, or names none."""
    text = as_written(_not_blank(where, value))
    if text in labels:
        return labels.index(text)
    number = whole_number(value)
    if number is not None and str(number) in labels:
        return labels.index(str(number))
    if isinstance(value, bool):
        alike = [place for place, name in enumerate(labels) if name.casefold() == text]
        if len(alike) == 1:
            return alike[0]
    elif (
        number is not None and 0 <= number < len(labels) and not any(whole_number(name) is not None for name in labels)
    ):
        return number
    known = ", ".join(f"{i} {name}" if name != str(i) else name for i, name in enumerate(labels[:10]))
    what = f"label {value!r} is none of the {len(labels)} classes"
    raise UserError(where, what, f"these are {known}{' ...' if len(labels) > 10 else ''}: mend or remove the row")


def _column(raw: Dataset | TextTable, name: str) -> Iterable[Any]:
    return (row[name] for row in raw.rows) if isinstance(raw, TextTable) else raw[name]


def _not_blank(where: str, value: Any) -> Any:
    if isinstance(value, list | dict | bytes):
        raise UserError(where, f"label {value!r} is neither a text nor a number", "mend or remove the row")
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise UserError(where, "has no label", "fill it in, or remove the row")
    return value


def _counted(where: str, task: Task, numbers: list[int]) -> tuple[str, ...]:
    """Names of classes that are counted from 0."""
    distinct = sorted(set(numbers))
    if len(distinct) > 1 and distinct != list(range(len(distinct))):
        said = ", ".join(map(str, distinct[:6])) + (" ..." if len(distinct) > 6 else "")
        cure = "number the classes from 0 without a gap, or name them by `labels:` in task.yaml"
        raise UserError(where, f"column {task.label!r} has the classes {said}", cure)
    return tuple(map(str, distinct))


def _check_apart(where: str, first_row: dict[str, int]) -> None:
    """first_row: of each label. Raises UserError where two are the same but for blanks and capitals."""
    seen: dict[str, str] = {}
    for text, row in first_row.items():
        other = seen.setdefault(" ".join(text.split()).casefold(), text)
        if other != text:
            what = f"label {text!r} differs from {other!r} of row {first_row[other]} by blanks or capitals alone"
            raise UserError(f"{where}, row {row}", what, f"{ALIKE}, or name both by `labels:` in task.yaml")
