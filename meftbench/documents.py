"""Files that may be anybody's, read with a limit of size, and without waiting for what is no file.

Every reader of YAML and JSON goes through here, so that a file can at worst be refused: in one line, and at once.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from meftbench.errors import UserError
from meftbench.units import MiB, format_bytes

# What people write: suites, budgets, profiles, tasks. The largest of this project has 60 KiB.
WRITTEN_BYTES = 4 * MiB
# What programs write: the suite of a run of 10,000 cells has 8 MiB, a model's configuration less than one.
GENERATED_BYTES = 64 * MiB
# Pipes that the shell hands over already open at the other end, as for `--budget <(command)`.
_HANDED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
DEEPEST = 100  # lists and mappings, one within the other; records have 6
MEND = "mend the file, or take it from a backup"


@contextmanager
def guarded(where: str, cure: str = MEND) -> Iterator[None]:
    """Around a reader of the file or value `where`: faults of its content that no single check foresees are UserErrors.

    Such are nesting that is too deep for a parser, numbers that no float holds, paths that no file system takes, and
    text that is not UTF-8. Other errors are raised as they are: faults of this program, and files that are absent.
    """
    try:
        yield
    except RecursionError:
        raise UserError(where, "is nested too deeply", cure) from None
    except MemoryError:
        raise UserError(where, "takes more memory than there is", cure) from None
    except OverflowError as error:
        raise UserError(where, f"holds a number that is too large ({error})", cure) from None
    except UnicodeError as error:
        raise UserError(where, f"holds text that is not UTF-8 ({type(error).__name__})", cure) from None
    except FileNotFoundError:
        raise
    except OSError as error:  # a name too long, a circle of links, a folder in place of a file
        named = f" of {error.filename}" if error.filename and str(error.filename) != where else ""
        what = f"cannot be read ({error.strerror or error}{named[:200]})"
        raise UserError(where, what, "name a file that can be read") from None
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        raise UserError(where, "holds a path with a NUL in it", cure) from None


@contextmanager
def opened(file: Path, cure: str = "name a file that can be read") -> Iterator[IO[bytes]]:
    """The file, open to read bytes. Raises UserError: it is absent, cannot be read, or is no regular file, such as a
    pipe, at which a reader would wait for ever, unless the shell has handed it over."""
    where = str(file)
    try:
        with guarded(where, cure):
            handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(where, "no such file", "check the path") from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISFIFO(mode) and where.startswith(_HANDED):
        os.set_blocking(handle, True)
    elif not stat.S_ISREG(mode):
        os.close(handle)
        what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
        raise UserError(where, what, "name a file" if stat.S_ISDIR(mode) else "copy it to a file first")
    with os.fdopen(handle, "rb") as stream:
        yield stream


def bytes_of(file: Path, limit: int = GENERATED_BYTES, cure: str = "name a file that can be read") -> bytes:
    """What the file holds. Raises UserError as `opened` does, and where the file has more than `limit` bytes."""
    with opened(file, cure) as stream, guarded(str(file), cure):
        found = os.fstat(stream.fileno())
        size = found.st_size
        # A pipe has no size.
        content = stream.read(limit + 1 if stat.S_ISFIFO(found.st_mode) else size + 1) if size <= limit else b""
        if max(size, len(content)) > limit:
            what = f"has {format_bytes(max(size, len(content)))}, and at most {format_bytes(limit)} are read"
            raise UserError(str(file), what, "make it smaller, or name another file")
    return content


def text_of(file: Path, limit: int = GENERATED_BYTES, cure: str = "save it as UTF-8") -> str:
    """The file's text, without the mark that some editors begin it with, and with line ends as `\\n`.

    Raises UserError as `bytes_of` does, and where the file is not UTF-8.
    """
    content = bytes_of(file, limit)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(str(file), f"cannot be read (byte {error.start + 1:,} is not UTF-8)", cure) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_of(file: Path, limit: int = GENERATED_BYTES, cure: str = MEND) -> Any:
    """What a JSON file holds. Raises UserError as `text_of` does, and where it is no JSON or nested too deeply."""
    text = text_of(file, limit, cure)
    with guarded(str(file), cure):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(str(file), f"is damaged ({error})", cure) from None
    check_depth(str(file), content, cure)
    return content


def json_object_of(file: Path, limit: int = GENERATED_BYTES, cure: str = MEND) -> dict[str, Any]:
    """The same of a file with one object. Raises UserError also where it is something else."""
    content = json_of(file, limit, cure)
    if not isinstance(content, dict):
        raise UserError(str(file), "is damaged (it is no mapping of fields to values)", cure)
    return content


def check_depth(where: str, content: Any, cure: str = MEND) -> None:
    """Raises UserError: plain `content` has more than 100 levels of lists and mappings, which what reads it may not
    bear, or a number of more than 300 digits, which no float holds."""
    level = [content]
    for _ in range(DEEPEST):
        for value in level:
            if type(value) is int and not -LARGEST < value < LARGEST:
                raise UserError(where, "holds a number of more than 300 digits", cure)
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [item for value in containers for item in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return
    raise UserError(where, "is nested too deeply", cure)


LARGEST = 10**300  # of whole numbers; above 10^308 none has a float, in which averages and shares are computed
