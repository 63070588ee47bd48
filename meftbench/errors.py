"""Errors that are the user's to mend: one line that says where, what, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

DONE = 0
OVER_BUDGET = 1
INVALID = 2
CELLS_FAILED = 3
NOT_COMPARABLE = 4
NOTHING_MATCHED = 5
BUG = 70
INTERRUPTED = 130
TERMINATED = 143

# torch's CPU allocator raises a plain RuntimeError, and CUDA libraries report exhaustion as a failed call: these are
# the only failures known by their text (seen in torch 2.13). cuDNN says NOT_SUPPORTED of a workspace that does not fit.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"
    r"|CUDNN_STATUS_NOT_SUPPORTED"
)


class UserError(Exception):
    """Wrong input. `main` prints it as one line on stderr and exits with `exit_code`; no traceback.

    where: file and line, cell, layer: what the sentence is about.  what: the fact.  cure: what to do.
    """

    def __init__(self, where: str, what: str, cure: str, exit_code: int = INVALID) -> None:
        super().__init__(f"{where}: {what}; {cure}" if where else f"{what}; {cure}")
        self.where, self.what, self.cure = where, what, cure
        self.exit_code = exit_code


def unknown(where: str, kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a closed list: the nearest name, or all of them."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    cure = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names)}"
    return UserError(where, f"unknown {kind} {name!r}", cure)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that host or device memory did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))


@contextmanager
def reading(fault: Callable[[Exception], UserError]) -> Iterator[None]:
    """Whatever is raised within, while files of the user's are read, is raised as what `fault` makes of it.

    A damaged file or a value of the wrong kind makes transformers, safetensors and tokenizers raise anything, such as
    KeyError for an activation that is unknown. UserError and a lack of memory pass as they are.
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
    """What a library says of a file that it cannot read, in one line."""
    if isinstance(error, KeyError):
        return f"transformers knows no {error}"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


class CellFailure(Exception):  # noqa: N818 - no error: a full device is a result
    """A cell that ended otherwise than `ok`, with what is known of it: a result, not a bug.

    status: "oom", "error" or "skipped".  detail: fields of a record's `status_detail`
    (type, message, phase, requested_bytes, free_bytes, capacity_bytes ...).
    """

    def __init__(self, status: str, **detail: object) -> None:
        super().__init__(str(detail.get("message", detail.get("type", status))))
        self.status = status
        self.detail = {key: value for key, value in detail.items() if value is not None}
