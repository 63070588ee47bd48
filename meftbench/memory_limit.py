"""A limit on the host memory that this process takes, so that malloc fails before the kernel ends a process."""

from __future__ import annotations

import re
import resource
from pathlib import Path


class memory_limit:  # noqa: N801 - used as a function
    """Within it the process may allocate `extra_bytes` beyond what it has allocated; None: no limit.

    Above that malloc fails and torch raises an error; without it the kernel would kill the largest process.
    Only the soft limit is lowered, so that it can be raised again.
    """

    def __init__(self, extra_bytes: int | None) -> None:
        self.extra_bytes = extra_bytes
        self.before = resource.getrlimit(resource.RLIMIT_DATA)

    def __enter__(self) -> None:
        if self.extra_bytes is not None:
            limit, hard = _data_bytes() + self.extra_bytes, self.before[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self.before)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process: its private writable memory. 0 where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"VmData:\s+([0-9]+) kB", status)
    return int(match[1]) * 1024 if match else 0
