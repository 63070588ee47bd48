"""Reads run folders (suite.yaml, environment.json, records.jsonl), and writes files in full or not at all.

Records are written by `records.writer`, one process at a time; any number may read.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic_core import from_json

from meftbench.catalogue.metrics import METRICS
from meftbench.documents import check_depth, guarded, json_object_of, opened, text_of
from meftbench.errors import UserError, one_line
from meftbench.escapes import single_line
from meftbench.records.checks import check_environment, check_suite
from meftbench.records.record import SCHEMA, Record
from meftbench.records.suite_text import read_suite_text
from meftbench.strict_yaml import parse_generated
from meftbench.units import MiB, format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

SUITE, ENVIRONMENT, RECORDS, BUDGETS, LOCK = "suite.yaml", "environment.json", "records.jsonl", "budgets.yaml", ".lock"

MOST_BYTES_A_RECORD = 16 * MiB  # the largest of this project's has 60 KiB


@dataclass(frozen=True)
class Run:
    """A run folder as read: the resolved suite, the environment, and the last record of each cell and repeat.

    torn: whether the last line was incomplete and left out (the run was killed while writing it).
    """

    path: Path
    suite: dict[str, Any]
    environment: dict[str, Any]
    records: list[Record]
    torn: bool = False

    @property
    def name(self) -> str:
        return str(self.suite["name"])

    @property
    def run_id(self) -> str:
        return str(self.suite["run_id"])

    def to_frame(self) -> DataFrame:
        """One row for each cell, as tables and plots use them (report.results.frame_of)."""
        # Imported by name, because records may not import reports (the import layers in pyproject.toml).
        frame: DataFrame = import_module("meftbench.report.results").frame_of(self)
        return frame

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(import_module("meftbench.report.render.notebook").run_html(self))


def folder_at(path: Path | str) -> Path:
    """`path` as a Path, whether a folder is there or not. Raises UserError: when no folder can have this path."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(repr(path), "is not a path", "give the path of a folder")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # reported by the caller, when it reads or writes there
    except (OSError, ValueError) as error:  # too long, a circle of links, a null character
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(str(path), f"cannot be a folder ({why})", "give another path") from None
    return Path(path)


def load_run(path: Path | str) -> Run:
    """Read a run folder. Raises UserError (exit 2): when it is absent, no run, damaged, or of a newer schema."""
    folder = folder_at(path)
    if not folder.is_dir():
        raise UserError(str(folder), "no such run folder", "name a folder that `meftbench run` wrote")
    if not (folder / SUITE).is_file() or not (folder / ENVIRONMENT).is_file():
        cure = f"a run has {SUITE}, {ENVIRONMENT} and {RECORDS}; `meftbench run` writes one"
        raise UserError(str(folder), "is not a run folder", cure)
    suite, environment = _suite_in(folder / SUITE), environment_in(folder / ENVIRONMENT)
    records, torn = read_records(folder / RECORDS)
    # A cell that was run again (`--retry`) has two lines, of which the later one counts.
    latest = {(record.cell_id, record.repeat): record for record in records}
    return Run(folder, suite, environment, list(latest.values()), torn)


_AGAIN = "run the suite again, or take the file from a backup"


def _suite_in(file: Path) -> dict[str, Any]:
    """The resolved suite of a run. Raises UserError: the file cannot be read, or lacks what a run's suite has."""
    text = text_of(file, cure=_AGAIN)
    try:
        with guarded(str(file), _AGAIN):
            suite = read_suite_text(text, parse_generated)
            check_depth(str(file), suite, _AGAIN)
            check_suite(suite)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(str(file), f"is damaged ({one_line(error)})", _AGAIN) from None
    return dict(suite)


def environment_in(file: Path) -> dict[str, Any]:
    """An environment that a run was made in. Raises UserError: the file cannot be read, or a field has another type."""
    environment = json_object_of(file, cure=_AGAIN)
    try:
        check_environment(environment)
    except ValueError as error:
        raise UserError(str(file), f"is damaged ({error})", _AGAIN) from None
    return environment


def read_records(file: Path) -> tuple[list[Record], bool]:
    """The records of a JSONL file, and whether a torn last line was left out.

    Raises UserError: when a line is not a record, or is one of a newer schema.
    """
    if not os.path.lexists(file):
        return [], False
    records: list[Record] = []
    with _without_garbage_collection(), opened(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MOST_BYTES_A_RECORD), b""), start=1):
            if line[-1:] != b"\n":
                if len(line) == MOST_BYTES_A_RECORD:
                    what = f"is a line of more than {format_bytes(MOST_BYTES_A_RECORD)}"
                    raise UserError(f"{file}:{number}", what, "remove the line, or take the file from a backup")
                return records, True
            records.append(record_in(line, f"{file}:{number}"))
    return records, False


def record_in(line: bytes, place: str) -> Record:
    """The record of a line. Raises UserError, with the `place` of the line: it is none, or of a newer schema."""
    try:
        content = _parsed(line)
        if content["schema"] > SCHEMA:
            raise UserError(place, f"record of schema {content['schema']}", "update meftbench")
        return Record.from_json(content)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(place, f"is not a record ({why})", "remove the line, or take the file from a backup") from None


def _parsed(line: bytes) -> Any:
    """What a line of JSON holds. Raises ValueError or RecursionError: it is no JSON."""
    try:
        # A parser in Rust: in two thirds of the time and memory of `json`, since equal texts are shared.
        return from_json(line)
    except ValueError:
        # It refuses what `json` takes: halves of characters, and deep nesting.
        return json.loads(line)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Suspend Python's search for reference cycles, which JSON does not contain.

    The search would visit every object that was read so far, again and again: it took half the time of a large run.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def warn_of_left_out(run: Run) -> None:
    """Say on stderr what tables and comparisons of the run lack: a last record that was cut off, and metrics of a later
    version, which have no meaning here."""
    place = single_line(str(run.path / RECORDS))
    if run.torn:
        cure = "`meftbench run --resume` repeats that cell"
        print(f"{place}: the last line is cut off and was left out; {cure}", file=sys.stderr)
    if unknown := sorted(set().union(*(record.metrics.keys() for record in run.records)) - METRICS.keys()):
        several = len(unknown) > 1
        what = f"{len(unknown)} metric{'s are' if several else ' is'} unknown to this version and left out"
        named = single_line(", ".join(unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        print(f"{place}: {what} ({named}); update meftbench, or read them with --json", file=sys.stderr)


def write_whole(file: Path, text: str) -> None:
    """Write `file` so that it is there in full or not at all. Raises UserError: when it cannot be written."""
    try:
        replace_file(file, text.encode())
    except OSError as error:
        raise unwritable(file.parent, error) from None


def replace_file(file: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `file`, then move it into place, so that nothing is half-written.

    A symbolic link is replaced by the file. Raises OSError: it cannot be written, or something else than a file (a
    folder, a device) has its name.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, f"{file.name} is not a regular file")
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only where something failed


def write_named(file: Path, content: bytes) -> None:
    """Write to a file that the user named: in full or not at all, and to the target of a link; to a device or a pipe as
    it comes. Raises OSError: it cannot be written."""
    if file.exists() and not file.is_file():
        with file.open("wb") as stream:
            stream.write(content)
    else:
        replace_file(file.resolve(), content)


def made(folder: Path) -> Path:
    """`folder`, created with its parents if it did not exist. Raises UserError: when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    return folder


def subfolder(folder: Path, name: str) -> Path:
    """The folder `name` of `folder`, created if it did not exist.

    Raises UserError: it cannot be created, or it is a symbolic link, which would lead what is written out of `folder`.
    """
    inner = folder / name
    refuse_links(folder, inner)
    return made(inner)


def refuse_link(file: Path) -> None:
    """Raises UserError where `file` is a symbolic link, through which its target would be written."""
    if file.is_symlink():
        cure = "remove the link: outputs are written into the folder itself, never through a link in it"
        raise UserError(str(file), "is a symbolic link", cure)


def refuse_links(folder: Path, path: Path) -> None:
    """Raises UserError where `path`, or a folder between it and `folder`, is a symbolic link. `folder` itself, which
    the user has named, may be one.

    Raises ValueError: `path` is not below `folder`."""
    within = path.relative_to(folder)
    for part in (within, *within.parents[:-1]):
        refuse_link(folder / part)


def refuse_links_within(folder: Path) -> None:
    """Raises UserError where anything in `folder`, at any depth, is a symbolic link, through which what is written
    there would be led out of it."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            refuse_link(Path(place, name))


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(str(folder), f"cannot be written ({error.strerror or error})", "choose another folder with --out")


RESUME = "then run it again with --resume: finished records are kept"
_DISK_CURES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EIO: "check the disk",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}


def ended_by_disk(file: Path, error: OSError) -> UserError:
    """The error that ends a run which cannot write `file`: why, and how the run is taken up again."""
    cure = _DISK_CURES.get(error.errno or 0, "make that possible")
    return UserError(str(file), f"cannot be written ({error.strerror or error})", f"{cure}, {RESUME}")
