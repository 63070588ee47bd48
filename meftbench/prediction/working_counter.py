"""A storage counter that lists its events, and counts what operators do in the last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meftbench.prediction.loops import LeftOut
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.work import WorkCounter
from meftbench.probes.storage_counter import StorageCounter


class WorkingCounter(StorageCounter):
    """Subclasses call operators by `_call`, and count their work in `work`.

    rounds_left_out: of loops in which they were, as `reversible.rounds` tells; their work is counted.
    """

    def __init__(self, device_type: str, remembered: Remembered) -> None:
        super().__init__(device_type)
        self.work = WorkCounter()
        self.events: list[tuple[str, int, int, str, str]] = []
        self.rounds_left_out: list[LeftOut] = []
        self._call = remembered

    def mark(self, phase: str) -> None:
        super().mark(phase)
        self.work.phase = phase

    def reset(self) -> None:
        super().reset()
        self.work.begin_step()

    def round_begins(self) -> tuple[int, Mapping[Any, int]]:
        """As of `reversible.rounds.Leaving`."""
        return len(self.events), self.work.snapshot()

    def left_out(self, rounds: int, begun: tuple[int, Mapping[Any, int]]) -> None:
        """As of `reversible.rounds.Leaving`."""
        events_before, work_before = begun
        self.rounds_left_out.append(LeftOut(len(self.events), len(self.events) - events_before, rounds))
        self.work.repeat_since(work_before, rounds)
