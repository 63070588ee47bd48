"""Errors that the user can correct: one line that says where, what is wrong, and what to do. Also the exit codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches

DONE = 0
OVER_BUDGET = 1
INVALID = 2
CELLS_FAILED = 3
NOT_COMPARABLE = 4
NOTHING_MATCHED = 5
BUG = 70
RESULT_NOT_WRITTEN = 74  # of a process of the worker only; EX_IOERR in sysexits.h
INTERRUPTED = 130
TERMINATED = 143

# torch's CPU allocator raises a plain RuntimeError, and CUDA libraries report a lack of memory as a failed call. Only
# these failures are recognised by their text (of torch 2.13). cuDNN says NOT_SUPPORTED if its workspace does not fit.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"
    r"|CUDNN_STATUS_NOT_SUPPORTED"
)


class UserError(Exception):
    """Wrong input. `main` prints it as one line on stderr and exits with `exit_code`; no traceback.

    where: what the message is about: a file and line, a cell, a layer.  what: what is wrong.  cure: what to do.
    """

    def __init__(self, where: str, what: str, cure: str, exit_code: int = INVALID) -> None:
        super().__init__(f"{where}: {what}; {cure}" if where else f"{what}; {cure}")
        self.where, self.what, self.cure = where, what, cure
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, int]]:
        """So that one that is raised in a rank of a distributed cell can be sent to the cell's process."""
        return type(self), (self.where, self.what, self.cure, self.exit_code)


def unknown(where: str, kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not one of `known`: it suggests the nearest name, or lists all of them, of very many
    those that contain it, or else a few that are not too unlike it."""
    names = sorted(known)
    nearest = get_close_matches(str(name), names)
    # Of equally near names, one whose letters changed places comes first: "lroa" is "lora", not "road".
    nearest.sort(key=lambda near: (-SequenceMatcher(None, near, str(name)).ratio(), sorted(near) != sorted(str(name))))
    cure = f"one of: {', '.join(names)}"
    if nearest:
        cure = f"did you mean {nearest[0]!r}?"
    elif len(names) > _LISTED:
        containing = [known_name for known_name in names if name and str(name).lower() in known_name.lower()]
        near = containing or get_close_matches(str(name), names, n=_NEAR, cutoff=0.0)
        cure = f"of {len(names)}, the nearest: {', '.join(near[:_NEAR])}"
    return UserError(where, f"unknown {kind} {name!r}", cure)


_LISTED = 70  # names that a message lists at most
_NEAR = 5


def one_line(error: BaseException) -> str:
    """The message of an error as one line; the name of its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that there was not enough host or device memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))


@contextmanager
def reading(fault: Callable[[Exception], UserError]) -> Iterator[None]:
    """Replace any exception raised in this context, in which user files are read, by the UserError of `fault`.

    A damaged file or a value of the wrong kind makes transformers, safetensors and tokenizers raise errors of many
    types, such as KeyError for an unknown activation. UserError and a lack of memory are raised unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise fault(error) from None


def reason_of(error: Exception) -> str:
    """Why a library could not read a file, as one line."""
    if isinstance(error, KeyError):
        return f"transformers knows no {error}"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return first_line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first_line}"


class CellFailure(Exception):  # noqa: N818 - no error: a full device is a result
    """Raised where a cell ends with a status other than `ok`, which is a result and not a bug.

    status: "oom", "error" or "skipped".  detail: fields of a record's `status_detail`
    (type, message, phase, requested_bytes, free_bytes, capacity_bytes ...).
    """

    def __init__(self, status: str, **detail: object) -> None:
        super().__init__(str(detail.get("message", detail.get("type", status))))
        self.status = status
        self.detail = {key: value for key, value in detail.items() if value is not None}
