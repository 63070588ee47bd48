"""How much time was spent waiting for a core that other processes occupied."""

from __future__ import annotations

from pathlib import Path

from meftbench.records.record import Metric

TASKS = Path("/proc/self/task")
ABSENT = "the system does not say how long threads waited for a core"


class CpuWait:
    """Time, since this object was made, that the threads of this process ran and waited for a core to run on.

    Source: Linux, /proc/PID/task/TID/schedstat, in nanoseconds (Documentation/scheduler/sched-stats). It is valid in a
    container, too, whatever else runs on the host.
    """

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = tasks
        self._before = self._read()

    def share(self) -> Metric:
        """cpu_wait_share: time waiting as a share of time running and waiting, over all threads."""
        ran = waited = 0
        for thread, (running, waiting) in self._read().items():
            before = self._before.get(thread, (0, 0))  # zeros: the thread was started since
            ran, waited = ran + running - before[0], waited + waiting - before[1]
        if ran <= 0:
            return Metric(None, "measured", absent=ABSENT)
        return Metric(max(0, waited) / (ran + max(0, waited)), "measured")

    def _read(self) -> dict[str, tuple[int, int]]:
        times = {}
        for path in self._tasks.glob("*/schedstat"):
            try:
                running, waiting, _ = map(int, path.read_text(encoding="ascii").split())
            except (OSError, ValueError):  # the thread has ended meanwhile, or the kernel writes another format
                continue
            times[path.parent.name] = (running, waiting)
        return times
