"""A storage counter that lists its events, and counts what operators do in the last step."""

from __future__ import annotations

from meftbench.prediction.remembered import Remembered
from meftbench.prediction.work import WorkCounter
from meftbench.probes.memory_counted import StorageCounter


class WorkingCounter(StorageCounter):
    """Subclasses call operators by `_call`, and count their work in `work`."""

    def __init__(self, device_type: str, remembered: Remembered) -> None:
        super().__init__(device_type)
        self.work = WorkCounter()
        self.events = []
        self._call = remembered

    def mark(self, phase: str) -> None:
        super().mark(phase)
        self.work.phase = phase

    def reset(self) -> None:
        super().reset()
        self.work.begin_step()
