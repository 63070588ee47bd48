"""Where the rows of a split come from: files below a data root, a folder of one's own, or the Hugging Face hub."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meftbench.catalogue.task import ALIASES, Task
from meftbench.errors import UserError
from meftbench.plan.training import DATA_VARIABLE
from meftbench.tasks.text_files import TextTable, read_text_files

if TYPE_CHECKING:
    from datasets import Dataset

CHECKSUMS = "SHA256SUMS"
CLASSES = "classes.json"
# By ending: the builder of `datasets` that reads it; None: text_files.py does. The first that is there is taken.
FORMATS: dict[str, str | None] = {
    "jsonl": None,
    "json": None,
    "csv": None,
    "tsv": None,
    "parquet": "parquet",
    "arrow": "arrow",
}


class Source(Protocol):
    """A place that has splits."""

    @property
    def origin(self) -> str:
        """Where it is, for the record."""

    @property
    def digests(self) -> list[str]:
        """SHA-256 of the files that were read and of which a digest is known."""

    def split(self, task: Task, name: str, hub_name: str) -> Dataset | TextTable | None:
        """The rows of a split by its name here and on the hub; None: there is no such split."""


def source_of(task: Task, data: str | None) -> Source:
    """What `data` means, or the variable MEFTBENCH_DATA, or the hub. Raises UserError: there is no such folder."""
    if Path(task.folder).is_absolute():
        return Files(Path(task.folder), Path(task.folder))
    said = "data root"
    if data is None:
        data, said = os.environ.get(DATA_VARIABLE) or None, DATA_VARIABLE
    if data is None:
        return Hub(task)
    root = Path(data).expanduser()
    if not root.is_dir():
        cure = "check the path, or leave it out to use the hub"
        raise UserError(f"task {task.name}", f"{said} is {data!r}, where no folder is", cure)
    if (root / task.folder).is_dir():
        return Files(root / task.folder, root)
    names = (*_names("train", task.train), *(n for e in task.evaluations.items() for n in _names(*e)))
    if any(_lies_here(root, name) for name in names):
        return Files(root, root)
    cure = f"put {task.folder}/train.jsonl there, or leave the data root out to use the hub"
    raise UserError(f"task {task.name}", f"{said} {data!r} has no folder {task.folder}", cure)


def _names(name: str, hub_name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((hub_name, name, *ALIASES.get(name, ()))))


def _lies_here(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or any(_files(folder, name, ending) for ending in (*FORMATS, "npz"))


def _files(folder: Path, name: str, ending: str) -> list[Path]:
    """The file of a split, or its pieces as the hub names them: train-00000-of-00002.parquet.

    Raises UserError: a piece is missing, or there is a whole file as well.
    """
    whole = folder / f"{name}.{ending}"
    pieces = sorted(folder.glob(f"{name}-*-of-*.{ending}"))
    if whole.is_file():
        if pieces:
            raise _two(whole, pieces[0])
        return [whole]
    if pieces:
        _check_pieces(name, pieces)
    return pieces


def _check_pieces(name: str, pieces: list[Path]) -> None:
    numbers = [re.fullmatch(rf"{re.escape(name)}-([0-9]+)-of-([0-9]+)", piece.stem) for piece in pieces]
    counts = {int(found[2]) for found in numbers if found}
    if len(counts) > 1:
        what = f"lies beside pieces of {len(counts)} sets, of which each has another number"
        raise UserError(str(pieces[0]), what, "leave one set there")
    there = {int(found[1]) for found in numbers if found}
    missing = sorted(set(range(*counts)) - there) if counts else []
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"piece {missing[0]:05d} of {max(counts):05d} is missing{more}"
        raise UserError(str(pieces[0].parent / name), what, "put all pieces there")


def _two(one: Path, other: Path) -> UserError:
    return UserError(str(one), f"{other.name} is there as well, and only one of them would be read", "remove the other")


@dataclass(frozen=True)
class Files:
    """A task's folder below a data root; where SHA256SUMS lies in the root, files are held against it before use."""

    folder: Path
    root: Path
    digests: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return str(self.folder)

    def split(self, task: Task, name: str, hub_name: str) -> Dataset | TextTable | None:
        called = [it for it in (name, *ALIASES.get(name, ())) if _lies_here(self.folder, it)]
        if len(called) > 1:
            raise _two(self.folder / called[0], self.folder / called[1])
        for split in _names(name, hub_name):
            found = {ending: files for ending in (*FORMATS, "npz") if (files := _files(self.folder, split, ending))}
            folder = self.folder / split
            tables = [files[0] for ending, files in found.items() if ending != "npz"]
            # Beside arrays a folder of images may show some of them.
            others = [found["npz"][0]] if "npz" in found else [folder] if folder.is_dir() else []
            if tables and len(tables + others) > 1:
                raise _two(*(tables + others)[:2])
            if "npz" in found:
                self._verify(found["npz"])
                return self._arrays(found["npz"][0], task)
            if found:
                return self._table(*next(iter(found.items())))
            if folder.is_dir():
                return self._folder(folder, task)
        return None

    def _table(self, ending: str, files: list[Path]) -> Dataset | TextTable:
        self._verify(files)
        if not any(file.stat().st_size for file in files):
            raise empty(str(files[0]))
        builder = FORMATS[ending]
        if builder is not None:
            return _built(str(files[0]), builder, [glob.escape(str(file)) for file in files])
        table = read_text_files(files, ending)
        if not len(table):
            raise empty(str(files[0]))
        return table

    def _folder(self, folder: Path, task: Task) -> Dataset:
        from datasets import load_from_disk

        files = sorted(file for file in folder.rglob("*") if file.is_file())
        self._verify(files)
        if (folder / "state.json").is_file():
            with _faults(str(folder)):
                return load_from_disk(str(folder), keep_in_memory=True)
        if not files:
            raise empty(str(folder))
        read = _built(str(folder), "imagefolder", [glob.escape(str(folder)) + "/**"], drop_labels=False)
        # Ids count the classes of this split alone; the name is what another split has in common with it.
        names = read.features["label"].names
        labels = [names[label] for label in read["label"]]
        read = read.remove_columns("label").add_column(task.label, labels)
        return read if task.texts[0] == "image" else read.rename_column("image", task.texts[0])

    def _arrays(self, file: Path, task: Task) -> Dataset:
        import numpy as np
        from datasets import Dataset, Features, Image, Value

        with _faults(str(file)), np.load(file) as arrays:
            pixels, ids = arrays["images"], arrays["labels"]
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(ids):
            what = f"images are {pixels.dtype} {pixels.shape}, labels {ids.shape}"
            raise UserError(str(file), what, "store images as uint8 (N, H, W) or (N, H, W, 3), and N labels")
        labels = ids.tolist()
        if classes := self._classes():
            labels = [classes[i] if 0 <= i < len(classes) else str(i) for i in labels]
        images = [{"bytes": _bitmap(image), "path": None} for image in pixels]
        features = Features({task.texts[0]: Image(), task.label: Value("string" if classes else "int64")})
        return Dataset.from_dict({task.texts[0]: images, task.label: labels}, features=features)

    def _classes(self) -> list[str]:
        file = self.folder / CLASSES
        if not file.is_file():
            return []
        try:
            return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError):
            raise UserError(str(file), "is not a JSON list of class names", "mend it") from None

    def _verify(self, files: list[Path]) -> None:
        sums = _checksums(self.root / CHECKSUMS)
        for file in files:
            said = sums.get(file.resolve())
            if said is None:
                continue
            with file.open("rb") as stream:
                if file_digest(stream, "sha256").hexdigest() != said:
                    raise UserError(
                        str(file), f"differs from {self.root / CHECKSUMS}", "fetch it again, or mend the sum"
                    )
            self.digests.append(said)


def _checksums(file: Path) -> dict[Path, str]:
    if not file.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {(file.parent / name.lstrip("*")).resolve(): digest for digest, name in lines}


def _bitmap(pixels: Any) -> bytes:
    """An uncompressed image file: the same bytes whatever the version of a codec, and quick to decode."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "BMP")
    return held.getvalue()


class Hub:
    """The Hugging Face hub, through the cache that `datasets` keeps."""

    def __init__(self, task: Task) -> None:
        if task.hub is None:
            cure = f"name a data root that has {task.folder}, or set {DATA_VARIABLE}"
            raise UserError(f"task {task.name}", "is not on the hub, and no data root is named", cure)
        self.path, self.config = task.hub
        self.origin = "hub " + "/".join(filter(None, task.hub))
        self.digests: list[str] = []  # `datasets` holds the files against the hub's own

    def split(self, task: Task, name: str, hub_name: str) -> Dataset | None:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            with _quiet():
                return load_dataset(self.path, self.config, split=hub_name, revision=task.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            what = f"{self.path!r} cannot be read from the hub ({_reason(error)})"
            cure = f"connect to it, or name a data root that has {task.folder} (or set {DATA_VARIABLE})"
            raise UserError(f"task {task.name}", what, cure) from None


def _built(where: str, builder: str, files: list[str], **options: Any) -> Dataset:
    """What a builder of `datasets` reads, in memory: its cache is a folder that is gone afterwards."""
    from datasets import load_dataset

    with _faults(where), _quiet(), tempfile.TemporaryDirectory(prefix="meftbench-") as cache:
        return load_dataset(
            builder, data_files={"train": files}, split="train", cache_dir=cache, keep_in_memory=True, **options
        )


@contextmanager
def _faults(where: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, DatasetsError) as error:
        reason = _reason(error)
        if "corresponds to no data" in reason:  # datasets 5.2 of a file that has columns and no rows
            raise empty(where) from None
        raise UserError(where, f"cannot be read ({reason})", "mend the file, or write it again") from None


def empty(where: str) -> UserError:
    """The error for a split without rows."""
    return UserError(where, "is an empty split", "put rows there, or use other data")


def _reason(error: BaseException) -> str:
    """The first line of what began it: `datasets` says only that an error occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars: a program that shows its own calls this."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
