"""One row of a task, checked: texts, choices, images, and the label as the number a head learns."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.task import IMAGE_COLUMN, Task
from meftbench.documents import bytes_of
from meftbench.errors import UserError
from meftbench.tasks.labels import as_written, check_columns, class_of, name_of_id, names_of_ids, whole_number
from meftbench.tasks.text_files import TextTable
from meftbench.units import MiB

if TYPE_CHECKING:
    from datasets import Dataset


# Of an image file; Pillow takes an image of more than 179 million pixels for a trap.
MOST_IMAGE_BYTES = 256 * MiB


class Digest:
    """A blake2b hash over the rows that are used, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, row: dict[str, Any], content: bytes = b"") -> None:
        """Add a row, as JSON, and the content of its image file."""
        line = json.dumps(row, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
        self._hash.update(len(line).to_bytes(8) + line + len(content).to_bytes(8) + content)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def rows_of(
    where: str,
    task: Task,
    raw: Dataset | TextTable,
    indices: list[int],
    labels: Sequence[str] | None,
    digest: Digest,
    folders: Sequence[Path],
) -> Dataset:
    """The rows `indices` of `raw`, checked and in the form of data.Splits; they are added to `digest`.

    where: begins the place in errors, which count rows from 1 as they are in the file.
    folders: below which image files are read that rows name; relative names are from the first.
    Raises UserError: when a column is missing, or a text, choice, label or image cannot be used.
    """
    from datasets import Dataset, Features, Image, List, Value

    check_columns(where, [*task.texts, task.label, *task.choices], raw)
    features: dict[str, Any]
    if task.kind == "images":
        features = {IMAGE_COLUMN: Image()}
        raw = _undecoded_images(where, raw, task.texts[0])
    else:
        features = {column: Value("string") for column in task.texts}
    if task.kind == "choices":
        features["choices"] = List(Value("string"))
    features["label"] = Value("float64" if task.kind == "regression" else "int64")
    columns: dict[str, list[Any]] = {column: [] for column in features}
    names = names_of_ids(raw, task.label)
    for index, row in zip(indices, _selected(raw, indices), strict=True):
        if names is not None:
            row = row | {task.label: name_of_id(row[task.label], names)}
        checked, content = _checked_row(f"{where}, row {index + 1}", task, row, labels, folders)
        digest.add({name: value for name, value in checked.items() if name != IMAGE_COLUMN or not content}, content)
        for column, value in checked.items():
            columns[column].append(value)
    return Dataset.from_dict(columns, features=Features(features))


def _selected(raw: Dataset | TextTable, indices: list[int]) -> Iterable[dict[str, Any]]:
    if isinstance(raw, TextTable):
        return (raw.rows[index] for index in indices)
    rows: Iterable[dict[str, Any]] = raw
    return rows if indices == list(range(len(raw))) else raw.select(indices, keep_in_memory=True)


def _checked_row(
    where: str, task: Task, row: dict[str, Any], labels: Sequence[str] | None, folders: Sequence[Path]
) -> tuple[dict[str, Any], bytes]:
    """The row as it is used, and the content of its image file (b"" without an image)."""
    if task.kind == "images":
        image = row[task.texts[0]] or {}
        if not image.get("bytes"):
            image = image | {"path": str(_named_file(where, image.get("path"), folders))}
        content = _image_file(where, image)
        return {IMAGE_COLUMN: image, "label": class_of(where, row[task.label], labels or ())}, content
    texts = {column: _text(where, column, row[column]) for column in task.texts}
    if task.kind == "choices":
        choices, answer = _choices(where, task, row)
        return texts | {"choices": choices, "label": answer}, b""
    if task.kind == "regression":
        return texts | {"label": _number(where, row[task.label])}, b""
    return texts | {"label": class_of(where, row[task.label], labels or ())}, b""


def _text(where: str, column: str, value: Any) -> str:
    if value is None or isinstance(value, list | dict | bytes):
        raise UserError(where, f"column {column!r} is {value!r}, not a text", "mend or remove the row")
    return _encodable(where, column, as_written(value))


def _encodable(where: str, column: str, text: str) -> str:
    """`text`. Raises UserError: when UTF-8 cannot encode it, as half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(where, f"column {column!r} holds half a character ({text!r})", "mend the row") from None
    return text


def _number(where: str, value: Any) -> float:
    try:
        # float() would accept 1_000 and True, which are no numbers in data.
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(where, f"label {value!r} is not a finite number", "mend or remove the row")
    return number


def _choices(where: str, task: Task, row: dict[str, Any]) -> tuple[list[str], int]:
    """The choices in order, and the index of the correct one."""
    keys: list[str] = []
    if len(task.choices) > 1:
        texts = [row[column] for column in task.choices]
    else:
        stored = row[task.choices[0]]
        texts = list(stored["text"]) if isinstance(stored, dict) else list(stored or [])
        keys = [as_written(key) for key in stored["label"]] if isinstance(stored, dict) else []
    choices = [_choice(where, task.choices[0], text) for text in texts]
    if len(choices) < 2 or not all(choices):
        raise UserError(where, f"its choices are {texts!r}", "give two or more, none of them empty")
    if task.label in task.choices:
        # The correct choice is always in the same column, so choices are shuffled. The seed is the row's content:
        # fewer rows, or rows drawn by another seed, keep the order.
        order = list(range(len(choices)))
        random.Random("\n".join([*(as_written(row[column]) for column in task.texts), *choices])).shuffle(order)
        return [choices[i] for i in order], order.index(task.choices.index(task.label))
    label = row[task.label]
    if as_written(label) in keys:
        return choices, keys.index(as_written(label))
    number = whole_number(label)
    if not keys and number is not None and 0 <= number < len(choices):
        return choices, number
    known = ", ".join(keys) if keys else f"0 to {len(choices) - 1}"
    raise UserError(where, f"label {label!r} names none of its choices", f"these are {known}: mend or remove the row")


def _choice(where: str, column: str, value: Any) -> str:
    """A choice without the blanks around it; "" where it is neither a text nor a number."""
    if value is None or isinstance(value, list | dict | bytes | bool):
        return ""
    return _encodable(where, column, as_written(value)).strip()


def _undecoded_images(where: str, raw: Dataset | TextTable, column: str) -> Dataset:
    """`raw` with images as files that are not decoded. Raises UserError: when the column has no images."""
    from datasets import Image

    if isinstance(raw, TextTable):
        raise UserError(where, f"column {column!r} holds no images but texts", "store image files, parquet or arrow")
    if not isinstance(raw.features[column], Image):
        what = f"column {column!r} holds no images but {raw.features[column]}"
        raise UserError(where, what, "store image files, or name the column that has them")
    return raw.cast_column(column, Image(decode=False))


def _image_file(where: str, image: dict[str, Any]) -> bytes:
    """The bytes of an image file. Raises UserError: when they cannot be decoded, or the file is none that `bytes_of`
    reads."""
    from PIL import Image, UnidentifiedImageError

    place = image.get("path") or where
    content: bytes = image.get("bytes") or bytes_of(Path(image["path"]), MOST_IMAGE_BYTES, "replace or remove it")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
    # Broken files raise all of these from Pillow 13's decoders.
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
        # Pillow's own message names an object in memory, which tells a user nothing.
        why = "not of a format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(str(place), f"is not an image that can be decoded ({why})", "replace or remove it") from None
    return content


def _named_file(where: str, name: str | None, folders: Sequence[Path]) -> Path:
    """The image file that a row names. Data may come from anybody, so a name does not lead out of the data's own
    folders; a link that lies there may, since stores of large files keep data in that way.

    Raises UserError: the row has no image, or its name leads out."""
    if not name:
        raise UserError(where, "has no image", "put one there, or remove the row")
    # `abspath` takes away `..` and follows no links.
    roots = [Path(os.path.abspath(folder)) for folder in folders]
    file = Path(os.path.abspath(roots[0] / name))
    if not any(file.is_relative_to(root) for root in roots):
        cure = "store the image beside the data, or in the row itself"
        raise UserError(where, f"names the image {name[:200]!r}, which is not below {roots[0]}", cure)
    return file
