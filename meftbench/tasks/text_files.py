"""Rows of text files (jsonl, json, csv, tsv) as they are written: no types are guessed, so no value is changed.

Readers that guess types turn 007 into 7, TRUE into True, a date into a point in time, and a column of labels into
texts because one of them is blank.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meftbench.documents import bytes_of
from meftbench.errors import UserError
from meftbench.units import MiB

Row = dict[str, Any]


class WrittenInt(int):
    """A whole number of a JSON file; `written`: its spelling there."""

    written: str


class WrittenFloat(float):
    """A number of a JSON file with a point or an exponent; `written`: its spelling there."""

    written: str


@dataclass(frozen=True)
class TextTable:
    """Rows, each by column. typed: whether the file tells texts from numbers; if not, every value is a string."""

    column_names: list[str]
    rows: list[Row]
    typed: bool

    def __len__(self) -> int:
        return len(self.rows)


def read_text_files(files: Sequence[Path], ending: str) -> TextTable:
    """The rows of a split's files, one after the other; `ending`: jsonl, json, csv or tsv.

    Raises UserError, with file and row: when a file is not UTF-8 or not of the form that its ending says, a row has
    other fields than the header, a name occurs twice, or the header is repeated.
    """
    names: list[str] = []
    rows: list[Row] = []
    for file in files:
        file_names, file_rows = _READERS[ending](str(file), _text_of(file))
        if rows and ending in ("csv", "tsv") and file_names != names:
            raise UserError(
                str(file), f"its columns are {', '.join(file_names)}, before they were {', '.join(names)}", MEND
            )
        names = list(dict.fromkeys([*names, *file_names]))
        rows += file_rows
    if ending in ("jsonl", "json"):
        rows = [dict.fromkeys(names) | row for row in rows]
    return TextTable(names, rows, typed=ending in ("jsonl", "json"))


MOST_BYTES = 512 * MiB  # of a file of rows; MNLI, the largest of GLUE, has 75 MiB
MEND = "mend the file, or write it again"


def _text_of(file: Path) -> str:
    try:
        # Not `text_of`, because line ends within a text are part of it.
        return bytes_of(file, MOST_BYTES, MEND).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"cannot be read (byte {error.start + 1:,} is not UTF-8)"
        raise UserError(str(file), what, "save it as UTF-8") from None


# --- separated values ---


def _separated_reader(delimiter: str, quoting: Any) -> Callable[[str, str], tuple[list[str], list[Row]]]:
    """A reader of csv or tsv: from a place for errors and a text to column names and rows."""

    def read(where: str, text: str) -> tuple[list[str], list[Row]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        lines = list(_filled_records(where, reader))
        if not lines:
            return [], []
        header, *records = lines
        doubled = [name for name, count in Counter(header).items() if name and count > 1]
        if doubled:
            raise UserError(where, f"its header names column {doubled[0]!r} twice", "rename or remove one")
        rows = []
        for number, fields in enumerate(records, 1):
            if len(fields) != len(header):
                what = f"has {len(fields)} fields, the header {len(header)}"
                raise UserError(f"{where}, row {number}", what, "mend the row; quote texts with separators in them")
            if fields == header:
                raise UserError(f"{where}, row {number}", "is the header once more", "remove the row")
            rows.append({name: field for name, field in zip(header, fields, strict=True) if name})
        return [name for name in header if name], rows

    return read


def _filled_records(where: str, reader: Any) -> Iterator[list[str]]:
    """The records, without blank lines, and with no limit on the size of a field."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from (fields for fields in reader if fields)
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}", f"cannot be read ({error})", MEND) from None
    finally:
        csv.field_size_limit(limit)


# --- JSON ---


def _json_lines(where: str, text: str) -> tuple[list[str], list[Row]]:
    # Not `splitlines`, because a text may contain a line separator of Unicode.
    lines = [line for line in text.split("\n") if line.strip()]
    return _objects(where, (_parsed(f"{where}, row {number}", line) for number, line in enumerate(lines, 1)))


def _json(where: str, text: str) -> tuple[list[str], list[Row]]:
    """A list of objects, an object of lists (columns), or objects line by line."""
    if not text.strip():
        return [], []
    try:
        content = _parsed(where, text)
    except UserError:
        first_line = text.strip().split("\n", 1)[0].strip()
        if first_line.startswith("{") and first_line.endswith("}"):
            return _json_lines(where, text)
        raise
    if isinstance(content, list):
        return _objects(where, content)
    if isinstance(content, dict) and content and all(isinstance(column, list) for column in content.values()):
        if len({len(column) for column in content.values()}) > 1:
            raise UserError(where, "its columns are not of one length", MEND)
        return list(content), [
            dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)
        ]
    return _objects(where, [content])


def _objects(where: str, objects: Iterable[Any]) -> tuple[list[str], list[Row]]:
    names: dict[str, None] = {}
    rows: list[Row] = []
    for number, row in enumerate(objects, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {number}", f"is no JSON object but {type(row).__name__}", MEND)
        names |= dict.fromkeys(row)
        rows.append(row)
    return list(names), rows


def _parsed(where: str, text: str) -> Any:
    def checked_object(pairs: list[tuple[str, Any]]) -> Row:
        doubled = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if doubled:
            raise UserError(where, f"names {doubled[0]!r} twice", "rename or remove one")
        return dict(pairs)

    def refuse_constant(written: str) -> Any:
        raise ValueError(f"{written} is no JSON")

    try:
        return json.loads(
            text,
            parse_constant=refuse_constant,
            object_pairs_hook=checked_object,
            parse_int=lambda written: _with_spelling(WrittenInt, written),
            parse_float=lambda written: _with_spelling(WrittenFloat, written),
        )
    except (ValueError, RecursionError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0] or type(error).__name__
        raise UserError(where, f"cannot be read ({reason})", MEND) from None


def _with_spelling(kind: Any, written: str) -> Any:
    number = kind(written)
    number.written = written
    return number


_READERS: dict[str, Callable[[str, str], tuple[list[str], list[Row]]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _separated_reader(",", csv.QUOTE_MINIMAL),
    "tsv": _separated_reader("\t", csv.QUOTE_NONE),
}
