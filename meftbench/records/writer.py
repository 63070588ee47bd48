"""Writes a run folder: suite.yaml, environment.json, records.jsonl. One process writes at a time.

A record is one line, written and fsynced; every other file is written under a temporary name and moved into place.
So whenever a run is killed, finished records are kept, and at most the last line is torn.

The folder is not trusted. Other programs remove and replace files (`git clean`, programs that synchronise folders), so
the writer keeps in memory what it has written, compares the folder with it after each record and at the end, and writes
again what is lost.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from meftbench.documents import bytes_of
from meftbench.errors import UserError, one_line
from meftbench.records.record import Record
from meftbench.records.store import (
    BUDGETS,
    ENVIRONMENT,
    LOCK,
    MOST_BYTES_A_RECORD,
    RECORDS,
    SUITE,
    ended_by_disk,
    record_in,
    refuse_link,
    replace_file,
    unwritable,
)

if TYPE_CHECKING:
    from filelock import FileLock

# Halves of surrogate pairs, which UTF-8 cannot encode; a message of an exception may contain them.
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")
# Files of a run beside its records: those of this name, and the environments in which it was resumed.
_OTHER_FILES = re.compile(
    "|".join((*map(re.escape, (SUITE, ENVIRONMENT, BUDGETS)), r"environment-[0-9a-f]+\.json")), re.ASCII
)
# Names under which `replace_file` writes the files of a run before it moves them into place.
_TEMPORARY = re.compile(rf"\.(?:{_OTHER_FILES.pattern}|{re.escape(RECORDS)})\.[a-z0-9_]+", re.ASCII)

Tell = Callable[[str], None]


def _say_nothing(note: str) -> None:
    """Ignores a note."""


@contextmanager
def writing(folder: Path, tell: Tell = _say_nothing) -> Iterator[Writer]:
    """The writer of `folder`, which is created if needed. tell: gets a sentence where lost files were written again.

    When it ends, all records are in the folder, however it ends.

    Raises UserError: the folder is not writable, another run writes there, or records were lost and cannot be written
    again.
    """
    writer = Writer(folder, tell)
    try:
        yield writer
        writer.verify()
    except BaseException as error:
        try:
            writer.check()
        except UserError:
            if not isinstance(error, UserError):
                raise
        raise
    finally:
        writer.close()


class NoRecordError(ValueError):
    """What was to be a record could not be read again as one."""


def line_of(record: Record) -> bytes:
    """The record as a line of the file. Raises NoRecordError: a reader would refuse it, and with it the whole file."""
    try:
        text = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False)
        line = _HALF_CHARACTERS.sub("\ufffd", text).encode() + b"\n"
        if len(line) > MOST_BYTES_A_RECORD:
            raise ValueError(f"it has {len(line):,} bytes")
        record_in(line, "the line")
    except UserError as error:
        raise NoRecordError(error.what) from None
    except (ValueError, TypeError, RecursionError) as error:  # of json: NaN, circles, what no JSON has, deep nesting
        raise NoRecordError(one_line(error)) from None
    return line


class Writer:
    """The one writer of a run folder. Use through `writing`."""

    def __init__(self, folder: Path, tell: Tell = _say_nothing) -> None:
        self.folder, self._tell = folder, tell
        self._folder_is_link = folder.is_symlink()
        self._locked_file: tuple[int, int] | None = None
        self._lock = self._locked()
        try:
            refuse_link(folder / RECORDS)
            self._remove_temporary_files()
            self._descriptor = _opened(folder / RECORDS)
            self._lines = self._complete_lines()
            self._size = sum(map(len, self._lines))
            self._files = {
                file.name: bytes_of(file)
                for file in folder.iterdir()
                if _OTHER_FILES.fullmatch(file.name) and file.is_file()
            }
        except OSError as error:
            self._lock.release()
            raise unwritable(folder, error) from None
        except UserError:
            self._lock.release()
            raise

    def append(self, record: Record) -> None:
        """Add one record; it is on the disk, in the file that is there, when this returns.

        Raises NoRecordError: it could not be read again. Raises UserError: it cannot be written. The file is then as it
        was before.
        """
        line = line_of(record)
        try:
            _write(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # the error that is raised says what matters
                if os.fstat(self._descriptor).st_size > self._size:
                    os.ftruncate(self._descriptor, self._size)
            raise ended_by_disk(self.folder / RECORDS, error) from None
        self._lines.append(line)
        self._size += len(line)
        self.check()

    def write(self, name: str, content: str | bytes) -> None:
        """Write another file of the folder, in full or not at all. Raises UserError: it cannot be written."""
        content = content.encode() if isinstance(content, str) else content
        try:
            replace_file(self.folder / name, content)
        except OSError as error:
            raise ended_by_disk(self.folder / name, error) from None
        self._files[name] = content

    def check(self) -> None:
        """Write again the files that were removed, replaced, or changed in length since they were written.

        Raises UserError: they cannot be written, or another run is in the folder now.
        """
        lost = [name for name in self._files if not _is_file(self.folder / name)]
        if _identity(self.folder / LOCK) != self._locked_file:
            self._lock_again(SUITE in lost)
        self._write_again(lost, self._are_records_lost())

    def verify(self) -> None:
        """`check`, and compare every byte of the records with what was written. Raises UserError as `check` does."""
        self.check()
        if not self._records_are_there():
            self._write_again([], are_records_lost=True)
            if not self._records_are_there():
                cure = f"check the disk; {len(self._lines)} records were written"
                raise UserError(str(self.folder / RECORDS), "does not hold what was written to it", cure)

    def close(self) -> None:
        os.close(self._descriptor)
        self._lock.release()

    # --- the lock ---

    def _locked(self) -> FileLock:
        """The lock of the folder, which is created if needed. Raises UserError: no lock can be had there."""
        from filelock import FileLock, Timeout  # which those who read need not wait for

        file = self.folder / LOCK
        refuse_link(file)
        lock = FileLock(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            self._locked_file = _identity(file)
        except Timeout:
            cure = "wait for it, or choose another --out"
            raise UserError(str(self.folder), "another run writes here", cure) from None
        except OSError as error:
            raise unwritable(self.folder, error) from None
        return lock

    def _lock_again(self, is_suite_lost: bool) -> None:
        """Lock the folder again where the lock was removed. Raises UserError: another run has begun there since, or a
        link has taken the place of the folder."""
        self._lock.release()
        if not self._folder_is_link:
            refuse_link(self.folder)
        self._lock = self._locked()
        try:
            another = not is_suite_lost and (self.folder / SUITE).read_bytes() != self._files.get(SUITE, b"")
        except FileNotFoundError:  # no run has begun yet, neither this one nor another
            another = False
        if another:
            self._locked_file = None  # so that every later check comes to the same end
            cure = f"{len(self._lines)} records of this run are lost; run it into another --out"
            raise UserError(str(self.folder), "was taken by another run while this one wrote there", cure)

    # --- what is lost ---

    def _are_records_lost(self) -> bool:
        """Whether the file of records is not the one that is open here, or of another length than was written."""
        opened = os.fstat(self._descriptor)
        there = _identity(self.folder / RECORDS)
        return there != (opened.st_dev, opened.st_ino) or opened.st_size != self._size

    def _records_are_there(self) -> bool:
        try:
            return (self.folder / RECORDS).read_bytes() == b"".join(self._lines)
        except OSError as error:
            raise ended_by_disk(self.folder / RECORDS, error) from None

    def _write_again(self, lost: Sequence[str], are_records_lost: bool) -> None:
        """Write the files `lost` again, and the records where they are lost, and tell so. Raises UserError."""
        name = RECORDS
        kept = ""
        try:
            for name in lost:
                kept += self._set_aside(name)
                replace_file(self.folder / name, self._files[name])
            if are_records_lost:
                name = RECORDS
                kept += self._set_aside(name)
                replace_file(self.folder / RECORDS, b"".join(self._lines))
                opened = _opened(self.folder / RECORDS)
                os.close(self._descriptor)
                self._descriptor = opened
        except OSError as error:
            raise ended_by_disk(self.folder / name, error) from None
        if names := [*lost, *([f"{RECORDS} ({len(self._lines)} records)"] if are_records_lost else [])]:
            what = "removed or changed by another program, and written again"
            self._tell(f"{self.folder}: {', '.join(names)}: {what}{kept}")

    def _set_aside(self, name: str) -> str:
        """Give another name to what is in the place of a file: to a folder, a pipe, and to records that hold anything
        which was not written here. Returns what to say of it."""
        file = self.folder / name
        if _identity(file) is None or file.is_symlink():  # a link is replaced; its target stays
            return ""
        if _is_file(file):
            if name != RECORDS:
                return ""
            found = file.read_bytes()
            if b"".join(self._lines).startswith(found) or not {*found.splitlines(keepends=True)} - {*self._lines}:
                return ""
        numbers = range(1, 2 + len([*self.folder.glob(f"{file.stem}-found-*")]))
        names = (f"{file.stem}-found-{number}{file.suffix}" for number in numbers)
        other = next(other for other in names if not os.path.lexists(self.folder / other))
        file.rename(self.folder / other)
        return f"; what was found there is kept in {other}"

    # --- what an earlier writer left ---

    def _complete_lines(self) -> list[bytes]:
        """The lines of the file. A last line without its end, which is no complete record, is cut off, so that the next
        record begins a line."""
        content = (self.folder / RECORDS).read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete != len(content):
            os.ftruncate(self._descriptor, complete)
        return [line + b"\n" for line in content[:complete].split(b"\n")[:-1]]

    def _remove_temporary_files(self) -> None:
        """Remove what a killed writer had not yet moved into place."""
        for file in self.folder.iterdir():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)


def _opened(records: Path) -> int:
    """A descriptor that appends to the file, which is created if needed; never to the target of a link.

    Raises UserError: it is a pipe or a device."""
    descriptor = os.open(records, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(str(records), "is not a regular file", "remove it, or choose another --out")
    return descriptor


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _identity(file: Path) -> tuple[int, int] | None:
    """Device and inode of what has this name (of a link itself, not of its target); None: nothing has."""
    try:
        there = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return there.st_dev, there.st_ino


def _is_file(file: Path) -> bool:
    """Whether a regular file has this name, and no link."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
