"""Where the rows of a split come from: files below a data root, a user's own folder, or the Hugging Face hub."""

from __future__ import annotations

import glob
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meftbench.catalogue.task import ALIASES, Task
from meftbench.documents import guarded, json_object_of, json_of, text_of
from meftbench.errors import UserError, reading
from meftbench.plan.training import DATA_VARIABLE
from meftbench.tasks.text_files import MEND, MOST_BYTES, TextTable, read_text_files
from meftbench.units import format_bytes

if TYPE_CHECKING:
    from datasets import Dataset

CHECKSUMS = "SHA256SUMS"
CLASSES = "classes.json"
STATE, INFO = "state.json", "dataset_info.json"  # of a split that `save_to_disk` of `datasets` wrote
# The builder of `datasets` that reads files of an ending; None: text_files.py reads them.
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
        """Where it is, as a record names it."""

    @property
    def folders(self) -> Sequence[Path]:
        """Folders below which the files lie that its rows may name."""

    @property
    def digests(self) -> list[str]:
        """SHA-256 of those files read that have a known checksum."""

    def split(self, task: Task, name: str, hub_name: str) -> Dataset | TextTable | None:
        """The rows of a split, called `name` here and `hub_name` on the hub; None: there is no such split."""


def source_of(task: Task, data: str | None) -> Source:
    """The source that `data` names, else that of the variable MEFTBENCH_DATA, else the hub.

    Raises UserError: when the folder does not exist or has none of the task's data; or there is no folder, and the task
    is not on the hub.
    """
    if Path(task.folder).is_absolute():
        return Files(Path(task.folder), Path(task.folder))
    root_name = "data root"
    if data is None:
        data, root_name = os.environ.get(DATA_VARIABLE) or None, DATA_VARIABLE
    if data is None:
        return Hub(task)
    root = Path(data).expanduser()
    if not root.is_dir():
        cure = "check the path, or leave it out to use the hub"
        raise UserError(f"task {task.name}", f"{root_name} is {data!r}, where no folder is", cure)
    if (root / task.folder).is_dir():
        return Files(root / task.folder, root)
    names = (
        *_split_names("train", task.train),
        *(split_name for evaluation in task.evaluations.items() for split_name in _split_names(*evaluation)),
    )
    if any(_has_split(root, name) for name in names):
        return Files(root, root)
    cure = f"put {task.folder}/train.jsonl there, or leave the data root out to use the hub"
    raise UserError(f"task {task.name}", f"{root_name} {data!r} has no folder {task.folder}", cure)


def _split_names(name: str, hub_name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((hub_name, name, *ALIASES.get(name, ()))))


def _has_split(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or any(_files(folder, name, ending) for ending in (*FORMATS, "npz"))


def _files(folder: Path, name: str, ending: str) -> list[Path]:
    """The file of a split, or its pieces as the hub names them: train-00000-of-00002.parquet.

    Raises UserError: when a piece is missing, or there is a whole file as well.
    """
    whole = folder / f"{name}.{ending}"
    pieces = sorted(folder.glob(f"{name}-*-of-*.{ending}"))
    if whole.is_file():
        if pieces:
            raise _ambiguous(whole, pieces[0])
        return [whole]
    if pieces:
        _check_pieces(name, pieces)
    return pieces


_DIGITS = 18  # of a number of pieces


def _check_pieces(name: str, pieces: list[Path]) -> None:
    """Raises UserError: when `pieces` are of several sets, or one is missing."""
    matches = [re.fullmatch(rf"{re.escape(name)}-([0-9]+)-of-([0-9]+)", piece.stem) for piece in pieces]
    if long := [piece for piece, match in zip(pieces, matches, strict=True) if match and len(match[2]) > _DIGITS]:
        raise UserError(str(long[0]), "says a number of pieces that no data have", "rename it as the hub names pieces")
    counts = {int(match[2]) for match in matches if match}
    if len(counts) > 1:
        what = f"lies beside pieces of {len(counts)} sets, of which each has another number"
        raise UserError(str(pieces[0]), what, "leave one set there")
    if irregular := [piece for piece in pieces if not piece.is_file()]:
        raise UserError(str(irregular[0]), "is not a regular file", "put the piece there itself")
    present = {int(match[1]) for match in matches if match}
    count = max(counts, default=0)
    # A name may say any number of pieces: those that are present are counted, not those that are not.
    missing = count - sum(number < count for number in present)
    if missing:
        first = next(number for number in range(count) if number not in present)
        more = f", and {missing - 1:,} more" if missing > 1 else ""
        what = f"piece {first:05d} of {count:05d} is missing{more}"
        raise UserError(str(pieces[0].parent / name), what, "put all pieces there")


def _ambiguous(first: Path, second: Path) -> UserError:
    return UserError(
        str(first), f"{second.name} is there as well, and only one of them would be read", "remove the other"
    )


@dataclass(frozen=True)
class Files:
    """A task's folder below a data root; where the root has a file SHA256SUMS, files are checked by it before use."""

    folder: Path
    root: Path
    digests: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return str(self.folder)

    @property
    def folders(self) -> Sequence[Path]:
        return (self.folder,)

    def split(self, task: Task, name: str, hub_name: str) -> Dataset | TextTable | None:
        present = [split_name for split_name in (name, *ALIASES.get(name, ())) if _has_split(self.folder, split_name)]
        if len(present) > 1:
            raise _ambiguous(self.folder / present[0], self.folder / present[1])
        for split in _split_names(name, hub_name):
            files_by_ending = {
                ending: files for ending in (*FORMATS, "npz") if (files := _files(self.folder, split, ending))
            }
            folder = self.folder / split
            tables = [files[0] for ending, files in files_by_ending.items() if ending != "npz"]
            # Where there are arrays, a folder of images may be there as well: it may show some of them.
            image_data = (
                [files_by_ending["npz"][0]] if "npz" in files_by_ending else [folder] if folder.is_dir() else []
            )
            if tables and len(tables + image_data) > 1:
                raise _ambiguous(*(tables + image_data)[:2])
            if "npz" in files_by_ending:
                self._verify(files_by_ending["npz"])
                return self._arrays(files_by_ending["npz"][0], task)
            if files_by_ending:
                return self._table(*next(iter(files_by_ending.items())))
            if folder.is_dir():
                return self._folder(folder, task)
        return None

    def _table(self, ending: str, files: list[Path]) -> Dataset | TextTable:
        self._verify(files)
        if not any(file.stat().st_size for file in files):
            raise empty(str(files[0]))
        builder = FORMATS[ending]
        if builder is not None:
            return _load_by_builder(str(files[0]), builder, [glob.escape(str(file)) for file in files])
        table = read_text_files(files, ending)
        if not len(table):
            raise empty(str(files[0]))
        return table

    def _folder(self, folder: Path, task: Task) -> Dataset:
        """A split that `save_to_disk` of `datasets` wrote, or images in folders by class."""
        from datasets import load_from_disk

        files = sorted(file for file in folder.rglob("*") if not file.is_dir())
        for file in files:
            if not file.is_file():  # such as a pipe, at which a reader would wait for ever
                raise UserError(str(file), "is not a regular file", "remove it, or replace it by the file itself")
        self._verify(files)
        if (folder / STATE).is_file():
            _check_saved(folder)
            with _reporting_faults(str(folder)):
                return load_from_disk(str(folder), keep_in_memory=True)
        if not files:
            raise empty(str(folder))
        for file in files:
            if file.stat().st_size > MOST_BYTES:
                what = f"has {format_bytes(file.stat().st_size)}, and at most {format_bytes(MOST_BYTES)} are read"
                raise UserError(str(file), what, "store images, and rows about them, in smaller files")
        rows = _load_by_builder(str(folder), "imagefolder", [glob.escape(str(folder)) + "/**"], drop_labels=False)
        # imagefolder numbers the classes of each split by itself; names of classes are the same in all splits.
        names = rows.features["label"].names
        labels = [names[label] for label in rows["label"]]
        rows = rows.remove_columns("label").add_column(task.label, labels)
        return rows if task.texts[0] == "image" else rows.rename_column("image", task.texts[0])

    def _arrays(self, file: Path, task: Task) -> Dataset:
        """Images and labels of an npz file; labels are the names in classes.json where there is one."""
        import numpy as np
        from datasets import Dataset, Features, Image, Value

        with _reporting_faults(str(file)), np.load(file) as arrays:
            # What is no array in the archive comes as bytes, which become an array that is refused.
            pixels, ids = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
        are_images, are_labels = pixels.dtype == np.uint8 and pixels.ndim in (3, 4), ids.dtype.kind in "iu"
        if not (are_images and are_labels and ids.shape == pixels.shape[:1]):
            what = f"images are {pixels.dtype} {pixels.shape}, labels {ids.dtype} {ids.shape}"
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
        names = json_of(file)
        if not isinstance(names, list):
            raise UserError(str(file), "is not a JSON list of class names", "mend it")
        return [str(name) for name in names]

    def _verify(self, files: list[Path]) -> None:
        """Raises UserError: when a file differs from its checksum; a file without one passes."""
        checksums = _checksums(self.root / CHECKSUMS)
        for file in files:
            expected = checksums.get(file.resolve())
            if expected is None:
                continue
            with file.open("rb") as stream:
                if file_digest(stream, "sha256").hexdigest() != expected:
                    raise UserError(
                        str(file), f"differs from {self.root / CHECKSUMS}", "fetch it again, or mend the sum"
                    )
            self.digests.append(expected)


def _check_saved(folder: Path) -> None:
    """Raises UserError: what `save_to_disk` wrote is damaged, or names files other than those beside it: `datasets`
    opens whatever is named there, wherever it is."""
    state = json_object_of(folder / STATE)
    json_object_of(folder / INFO)
    tables = state.get("_data_files")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(str(folder / STATE), "lists no data files", MEND)
    beside = {file.name for file in folder.iterdir() if file.is_file()}
    for table in tables:
        name = table.get("filename")
        if not isinstance(name, str) or name not in beside:
            what = f"names the file {name!r:.200}, which does not lie beside it"
            raise UserError(str(folder / STATE), what, "save the data again, or name a file of this folder")


def _checksums(file: Path) -> dict[Path, str]:
    """The digests in `file`, which is written as sha256sum writes it, by path; none where there is no such file."""
    if not file.is_file():
        return {}
    checksums = {}
    with guarded(str(file)):
        for number, line in enumerate(text_of(file).splitlines(), 1):
            digest, _, name = line.strip().partition(" ")
            if digest and not name:
                raise UserError(f"{file}:{number}", "has no digest and name", "write it as sha256sum does")
            if digest:
                checksums[(file.parent / name.strip().lstrip("*")).resolve()] = digest
    return checksums


def _bitmap(pixels: Any) -> bytes:
    """An uncompressed image file, whose bytes depend on no version of a codec and which is quick to decode."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


class Hub:
    """The Hugging Face hub, through the cache that `datasets` keeps."""

    def __init__(self, task: Task) -> None:
        if task.hub is None:
            cure = f"name a data root that has {task.folder}, or set {DATA_VARIABLE}"
            raise UserError(f"task {task.name}", "is not on the hub, and no data root is named", cure)
        self.path, self.config = task.hub
        self.origin = "hub " + "/".join(filter(None, task.hub))
        self.digests: list[str] = []  # stays empty: `datasets` checks files by the hub's checksums

    @property
    def folders(self) -> Sequence[Path]:
        """The caches into which archives of images are unpacked."""
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        return (Path(config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))

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


def _load_by_builder(where: str, builder: str, files: list[str], **options: Any) -> Dataset:
    """The rows that a builder of `datasets` reads, in memory: its cache is a temporary folder."""
    from datasets import load_dataset

    with _reporting_faults(where), _quiet(), tempfile.TemporaryDirectory(prefix="meftbench-") as cache:
        return load_dataset(
            builder, data_files={"train": files}, split="train", cache_dir=cache, keep_in_memory=True, **options
        )


@contextmanager
def _reporting_faults(where: str) -> Iterator[None]:
    """Turns errors of `datasets` and numpy into a UserError at `where`: on a damaged file they, and the libraries that
    they read it by, raise errors of many types."""

    def fault(error: Exception) -> UserError:
        reason = _reason(error)
        if "corresponds to no data" in reason:  # what datasets 5.2 says of a file with columns and no rows
            return empty(where)
        return UserError(where, f"cannot be read ({reason})", "mend the file, or write it again")

    with reading(fault):
        yield


def empty(where: str) -> UserError:
    """The error for a split without rows."""
    return UserError(where, "is an empty split", "put rows there, or use other data")


def _reason(error: BaseException) -> str:
    """The first line of the error at the root of `error`: `datasets` itself says only that an error occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Switches off progress bars of `datasets`, because the program that calls this shows its own."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
