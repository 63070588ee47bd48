"""How much of a time was spent waiting for a core that other processes held."""

from __future__ import annotations

from pathlib import Path

from meftbench.records.record import Metric

TASKS = Path("/proc/self/task")
ABSENT = "the system does not say how long threads waited for a core"


class CpuWait:
    """From its making on: nanoseconds that the threads of this process ran, and waited for a core to run on.

    Source: Linux, /proc/PID/task/TID/schedstat (Documentation/scheduler/sched-stats), so that it holds in a container
    too, whatever else runs on the host.
    """

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = tasks
        self._before = self._read()

    def share(self) -> Metric:
        """cpu_wait_share: waiting as a share of running and waiting, of all threads."""
        ran = waited = 0
        for thread, (running, waiting) in self._read().items():
            before = self._before.get(thread, (0, 0))  # of a thread that was started since
            ran, waited = ran + running - before[0], waited + waiting - before[1]
        if ran <= 0:
            return Metric(None, "measured", absent=ABSENT)
        return Metric(max(0, waited) / (ran + max(0, waited)), "measured")

    def _read(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self._tasks.glob("*/schedstat"):
            try:
                running, waiting, _ = map(int, path.read_text(encoding="ascii").split())
            except (OSError, ValueError):  # a thread that has ended meanwhile; a kernel that writes something else
                continue
            found[path.parent.name] = (running, waiting)
        return found
