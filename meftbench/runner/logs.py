"""The files of a run's processes: what they print, and the results that they leave for the parent process."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from meftbench import documents
from meftbench.errors import UserError
from meftbench.kept_output import ROOM
from meftbench.records.store import ended_by_disk, refuse_link

TAIL = 400  # characters of what a process has printed that a message quotes


def opened(log: Path) -> IO[bytes]:
    """The file, to append to; created if needed. Raises UserError: it is a link, or cannot be written."""
    refuse_link(log)
    try:
        return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "ab")
    except OSError as error:
        raise ended_by_disk(log, error) from None


def end_of(log: Path) -> str:
    """The end of what the process printed, in one line."""
    try:
        with documents.opened(log) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4 * TAIL))
            text = stream.read(4 * TAIL).decode(errors="replace")
    except (UserError, OSError):  # it is not there, or no file any more
        return "it printed nothing"
    return " | ".join(text.split("\n")).strip(" |")[-TAIL:] or "it printed nothing"


def shorten(log: Path) -> None:
    """Remove the file if it is empty, and cut it to its last mebibyte, in place, if it is longer. What is no file stays
    as it is."""
    try:
        found = log.lstat()
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            return
        if size == 0:
            log.unlink()
        elif size > ROOM:
            with log.open("r+b") as stream:
                stream.seek(size - ROOM)
                end = stream.read(ROOM)
                stream.seek(0)
                stream.write(end)
                stream.truncate(len(end))
    except FileNotFoundError:
        return  # nothing was printed, or somebody has removed it


def tidy(logs: Path) -> None:
    """Delete empty logs, results that nobody reads any more, also half-written ones, and the folder if it is then
    empty."""
    if logs.is_symlink() or not logs.is_dir():
        return
    for file in [*logs.glob("*.json"), *logs.glob(".*.json.*")]:
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)
    for log in logs.glob("*.log"):
        shorten(log)
    if not any(logs.iterdir()):
        logs.rmdir()
