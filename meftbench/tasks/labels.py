"""Labels of a task: which classes there are, and which of them a row's label names.

A label is compared with the class names as text. Only where none of the names is a number may a label be the index of
a class, counted from 0.
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
    """A value as its file has it: a string unchanged, a number of a JSON file with its own digits, a truth value as
    JSON writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(getattr(value, "written", value))


def whole_number(value: Any) -> int | None:
    """The whole number that a value is or spells (1, 1.0, "1", "1.0"); None for all else, truth values included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return int(value) if value == value // 1 else None
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.split(".")[0])
    return None


def check_columns(where: str, needed: Iterable[str], raw: Dataset | TextTable) -> None:
    """Raises UserError: when `raw` lacks one of the columns `needed`."""
    for column in needed:
        if column not in raw.column_names:
            present = ", ".join(raw.column_names) or "none"
            raise UserError(where, f"has no column {column!r}", f"its columns are {present}: rename one")


def names_of_ids(raw: Dataset | TextTable, column: str) -> list[str] | None:
    """The names by id where the file itself has them (a ClassLabel of `datasets`)."""
    return None if isinstance(raw, TextTable) else getattr(raw.features[column], "names", None)


def name_of_id(value: Any, names: Sequence[str]) -> Any:
    """The name that an id stands for; a value that has no name is returned as it is."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def label_kind(where: str, task: Task, raw: Dataset | TextTable | None, like: str | None = None) -> str | None:
    """The type of a classification's labels: "a text", "a number" or "a truth value"; None: the file does not tell
    (csv, tsv), or has names for them.

    like: the type in the training rows.
    Raises UserError: when a label has another type than `like`, or than the labels before it.
    """
    if raw is None or task.kind != "classification" or task.label not in raw.column_names:
        return None
    if (isinstance(raw, TextTable) and not raw.typed) or names_of_ids(raw, task.label) is not None:
        return None
    first = like
    for number, value in enumerate(_column(raw, task.label), 1):
        if value is None or isinstance(value, list | dict | bytes):
            continue  # reported where the row is read
        kind = "a text" if isinstance(value, str) else "a truth value" if isinstance(value, bool) else "a number"
        first = first or kind
        if kind != first:
            reference = "those of the training rows are" if like else "that of rows before is"
            raise UserError(f"{where}, row {number}", f"label {value!r} is {kind}, {reference} {first}", ALIKE)
    return first


def class_names(where: str, task: Task, train: Dataset | TextTable | None) -> tuple[str, ...] | None:
    """Names of the classes by id: the task's, or those that the training rows have; None: it has no classes.

    Raises UserError: when there is no column of labels, a label is blank, two differ by blanks or capitals alone, whole
    numbers are not 0, 1, 2 ..., or there is only one class.
    """
    if task.kind in ("regression", "choices") or task.labels is not None:
        return task.labels
    assert train is not None
    check_columns(where, [task.label], train)
    names_in_file = names_of_ids(train, task.label)
    if names_in_file is not None:
        return tuple(names_in_file)
    first_row: dict[Any, int] = {}  # the first row of each label
    for number, value in enumerate(_column(train, task.label), 1):
        first_row.setdefault(_not_blank(f"{where}, row {number}", value), number)
    numbers = [whole_number(value) for value in first_row]
    untyped = isinstance(train, TextTable) and not train.typed
    if first_row and (untyped or not any(isinstance(value, str) for value in first_row)) and None not in numbers:
        names = _numbered_classes(where, task, sorted(number for number in numbers if number is not None))
    elif all(isinstance(value, bool) for value in first_row):
        names = ("false", "true")
    else:
        names = tuple(sorted({as_written(value) for value in first_row}))
        _check_distinct(where, {as_written(value): row for value, row in first_row.items()})
    if len(first_row) < 2:
        raise UserError(where, f"column {task.label!r} has one class only", "train on two or more")
    return names


def class_of(where: str, value: Any, labels: Sequence[str]) -> int:
    """The id of the class that a row's label names. Raises UserError: when it is blank, or names no class."""
    text = as_written(_not_blank(where, value))
    if text in labels:
        return labels.index(text)
    number = whole_number(value)
    if number is not None and str(number) in labels:
        return labels.index(str(number))
    if isinstance(value, bool):
        matches = [place for place, name in enumerate(labels) if name.casefold() == text]
        if len(matches) == 1:
            return matches[0]
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
    """`value`. Raises UserError: when it is blank, or neither a text nor a number."""
    if isinstance(value, list | dict | bytes):
        raise UserError(where, f"label {value!r} is neither a text nor a number", "mend or remove the row")
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise UserError(where, "has no label", "fill it in, or remove the row")
    return value


def _numbered_classes(where: str, task: Task, numbers: list[int]) -> tuple[str, ...]:
    """Names of classes whose labels are numbers. Raises UserError: when they are not 0, 1, 2 ... without a gap."""
    distinct = sorted(set(numbers))
    if len(distinct) > 1 and distinct != list(range(len(distinct))):
        shown = ", ".join(map(str, distinct[:6])) + (" ..." if len(distinct) > 6 else "")
        cure = "number the classes from 0 without a gap, or name them by `labels:` in task.yaml"
        raise UserError(where, f"column {task.label!r} has the classes {shown}", cure)
    return tuple(map(str, distinct))


def _check_distinct(where: str, first_row: dict[str, int]) -> None:
    """first_row: the first row of each label. Raises UserError: when two differ by blanks or capitals alone."""
    seen: dict[str, str] = {}
    for text, row in first_row.items():
        earlier = seen.setdefault(" ".join(text.split()).casefold(), text)
        if earlier != text:
            what = f"label {text!r} differs from {earlier!r} of row {first_row[earlier]} by blanks or capitals alone"
            raise UserError(f"{where}, row {row}", what, f"{ALIKE}, or name both by `labels:` in task.yaml")
