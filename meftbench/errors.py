"""Errors that are the user's to mend: one line that says where, what, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
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


class CellFailure(Exception):  # noqa: N818 - no error: a full device is a result
    """A cell that ended otherwise than `ok`, with what is known of it: a result, not a bug.

    status: "oom", "error" or "skipped".  detail: fields of a record's `status_detail`
    (type, message, phase, requested_bytes, free_bytes, capacity_bytes ...).
    """

    def __init__(self, status: str, **detail: object) -> None:
        super().__init__(str(detail.get("message", detail.get("type", status))))
        self.status = status
        self.detail = {key: value for key, value in detail.items() if value is not None}
