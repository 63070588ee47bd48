"""A limit on the host memory that this process takes, so that malloc fails before the kernel ends a process."""

from __future__ import annotations

import re
import resource
from pathlib import Path

_ARENA = 2**20  # bytes that Python 3.11 asks the system for, when it has no room for another object


class memory_limit:  # noqa: N801 - used as a function
    """Within it the process may allocate `extra_bytes` beyond what it has allocated; None: no limit.

    Above that malloc fails and torch raises an error; without it the kernel would kill the largest process.
    Only the soft limit is lowered, so that it can be raised again.
    exhausted: whether an exception has left it while there was no room for more of Python's objects.
    """

    def __init__(self, extra_bytes: int | None) -> None:
        self.extra_bytes = extra_bytes
        self.before = resource.getrlimit(resource.RLIMIT_DATA)
        self.exhausted = False

    def __enter__(self) -> None:
        if self.extra_bytes is not None:
            limit, hard = _data_bytes() + self.extra_bytes, self.before[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def __exit__(self, kind: object, *_: object) -> None:
        limit, _hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, self.before)
        if kind is not None and self.extra_bytes is not None:
            self.exhausted = _data_bytes() > limit - 2 * _ARENA


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process: its private writable memory. 0 where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"VmData:\s+([0-9]+) kB", status)
    return int(match[1]) * 1024 if match else 0
