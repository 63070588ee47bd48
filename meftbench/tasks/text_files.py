"""Rows of text files (jsonl, json, csv, tsv) as they are written: nothing guesses at types, so nothing is rewritten.

Readers of tables that guess turn 007 into 7, TRUE into True, a date into a point in time, and a column of labels into
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

from meftbench.errors import UserError

Row = dict[str, Any]


class WrittenInt(int):
    """A whole number of a JSON file; `written`: as it stands there."""

    written: str


class WrittenFloat(float):
    """A number of a JSON file with a point or an exponent; `written`: as it stands there."""

    written: str


@dataclass(frozen=True)
class TextTable:
    """Rows by column. typed: the file tells texts from numbers; else every value is a string."""

    column_names: list[str]
    rows: list[Row]
    typed: bool

    def __len__(self) -> int:
        return len(self.rows)


def read_text_files(files: Sequence[Path], ending: str) -> TextTable:
    """The rows of a split's files, one after the other; `ending`: jsonl, json, csv or tsv.

    Raises UserError, with file and row: not UTF-8, not of the form its ending says, a row with other fields than the
    header, a name that stands twice, a header that is repeated.
    """
    names: list[str] = []
    rows: list[Row] = []
    for file in files:
        found, read = _READERS[ending](str(file), _text_of(file))
        if rows and ending in ("csv", "tsv") and found != names:
            raise UserError(str(file), f"its columns are {', '.join(found)}, before they were {', '.join(names)}", MEND)
        names = list(dict.fromkeys([*names, *found]))
        rows += read
    if ending in ("jsonl", "json"):
        rows = [dict.fromkeys(names) | row for row in rows]
    return TextTable(names, rows, typed=ending in ("jsonl", "json"))


MEND = "mend the file, or write it again"


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"cannot be read (byte {error.start + 1:,} is not UTF-8)"
        raise UserError(str(file), what, "save it as UTF-8") from None
    except OSError as error:
        raise UserError(str(file), f"cannot be read ({error.strerror})", MEND) from None


# --- separated values ---


def _separated(delimiter: str, quoting: Any) -> Callable[[str, str], tuple[list[str], list[Row]]]:
    def read(where: str, text: str) -> tuple[list[str], list[Row]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        lines = list(_lines(where, reader))
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


def _lines(where: str, reader: Any) -> Iterator[list[str]]:
    """Records that are not blank lines."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from (fields for fields in reader if fields)
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}", f"cannot be read ({error})", MEND) from None
    finally:
        csv.field_size_limit(limit)


# --- JSON ---


def _json_lines(where: str, text: str) -> tuple[list[str], list[Row]]:
    # Not `splitlines`: a line separator of Unicode may stand in a text.
    lines = [line for line in text.split("\n") if line.strip()]
    return _objects(where, (_parsed(f"{where}, row {number}", line) for number, line in enumerate(lines, 1)))


def _json(where: str, text: str) -> tuple[list[str], list[Row]]:
    """A list of objects, an object of lists (columns), or objects line by line."""
    if not text.strip():
        return [], []
    try:
        read = _parsed(where, text)
    except UserError:
        first = text.strip().split("\n", 1)[0].strip()
        if first.startswith("{") and first.endswith("}"):
            return _json_lines(where, text)
        raise
    if isinstance(read, list):
        return _objects(where, read)
    if isinstance(read, dict) and read and all(isinstance(column, list) for column in read.values()):
        if len({len(column) for column in read.values()}) > 1:
            raise UserError(where, "its columns are not of one length", MEND)
        return list(read), [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]
    return _objects(where, [read])


def _objects(where: str, read: Iterable[Any]) -> tuple[list[str], list[Row]]:
    names: dict[str, None] = {}
    rows: list[Row] = []
    for number, row in enumerate(read, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {number}", f"is no JSON object but {type(row).__name__}", MEND)
        names |= dict.fromkeys(row)
        rows.append(row)
    return list(names), rows


def _parsed(where: str, text: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> Row:
        doubled = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if doubled:
            raise UserError(where, f"names {doubled[0]!r} twice", "rename or remove one")
        return dict(pairs)

    def no_json(written: str) -> Any:
        raise ValueError(f"{written} is no JSON")

    try:
        return json.loads(
            text,
            parse_constant=no_json,
            object_pairs_hook=distinct,
            parse_int=lambda written: _written(WrittenInt, written),
            parse_float=lambda written: _written(WrittenFloat, written),
        )
    except (ValueError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0] or type(error).__name__
        raise UserError(where, f"cannot be read ({reason})", MEND) from None


def _written(kind: Any, written: str) -> Any:
    number = kind(written)
    number.written = written
    return number


_READERS: dict[str, Callable[[str, str], tuple[list[str], list[Row]]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _separated(",", csv.QUOTE_MINIMAL),
    "tsv": _separated("\t", csv.QUOTE_NONE),
}
