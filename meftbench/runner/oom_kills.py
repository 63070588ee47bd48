"""How many processes the kernel has killed because memory ran out: the only evidence that SIGKILL meant that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from meftbench.runner.host import CGROUP

PROC = Path("/proc")
# In memory.events of cgroup version 2, memory.oom_control of version 1, and /proc/vmstat.
_KILLS = re.compile(r"^oom_kill ([0-9]+)$", re.MULTILINE)

Kills = Mapping[Path, int]


def oom_kills(root: Path = CGROUP, proc: Path = PROC) -> Kills:
    """The counts of such kills by the files that have them: those of this process's cgroup, and of the whole system.

    Empty where the system counts none (it is not Linux, or hides them).
    """
    counts = {}
    for file in _files(root, proc):
        try:
            found = _KILLS.search(file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if found:
            counts[file] = int(found[1])
    return counts


def has_killed(before: Kills, now: Kills) -> bool:
    """Whether a count has risen."""
    return any(now[file] > count for file, count in before.items() if file in now)


def one_more(before: Kills) -> Kills:
    """The counts after one kill, so that it explains the end of one process and of no other."""
    return {file: count + 1 for file, count in before.items()}


def of_kill(before: Kills) -> tuple[bool, str]:
    """Whether the kernel has killed a process for memory since `before`, and the message for a process that was ended
    by SIGKILL."""
    if has_killed(before, oom_kills()):
        return True, "killed by the kernel because the memory of the host, or of its container, ran out"
    if before:
        return False, "was killed by SIGKILL, not by the kernel for memory"
    return False, "was killed by SIGKILL; this system does not tell whether for memory"


def _files(root: Path, proc: Path) -> Iterator[Path]:
    """The files that may have such a count. In a container, the files at the root are those of its own cgroup."""
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
