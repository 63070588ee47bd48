"""How many processes the kernel has killed because memory ran out: the only evidence that SIGKILL meant that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from meftbench.runner.host import CGROUP

PROC = Path("/proc")
# In memory.events of cgroup version 2, memory.oom_control of version 1, and /proc/vmstat.
_KILLS = re.compile(r"^oom_kill ([0-9]+)$", re.MULTILINE)


def oom_kills(root: Path = CGROUP, proc: Path = PROC) -> int | None:
    """The number of such kills in the cgroup of this process, whatever ran out: its own memory or the machine's.

    Where the cgroup has no such number, that of the whole system; None where there is none either (the system is not
    Linux, or hides it).
    """
    for file in _files(root, proc):
        try:
            found = _KILLS.search(file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if found:
            return int(found[1])
    return None


def of_kill(before: int | None) -> tuple[bool, str]:
    """Whether the kernel has killed a process for memory since it had killed `before`, and the message for a process
    that was ended by SIGKILL."""
    now = oom_kills()
    if before is None or now is None:
        return False, "was killed by SIGKILL; this system does not tell whether for memory"
    if now > before:
        return True, "killed by the kernel because the memory of the host, or of its container, ran out"
    return False, "was killed by SIGKILL, not by the kernel for memory"


def _files(root: Path, proc: Path) -> Iterator[Path]:
    """The files that may have such a number, the most specific first. In a container, the files at the root are those
    of its own cgroup."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield root / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield root / "memory" / path.lstrip("/") / "memory.oom_control"
    yield root / "memory.events"
    yield root / "memory" / "memory.oom_control"
    yield proc / "vmstat"
