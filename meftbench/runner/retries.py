"""A cell whose machine, or the worker on it, was lost is run once more, elsewhere if there is another place for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meftbench.runner.engine import Slot, kind_of
from meftbench.runner.job import Outcome
from meftbench.runner.schedule import Attempt, Key


@dataclass
class Retries:
    """Which attempts are to be made again, and what became of them before.

    waiting: those that have not begun again, with the slots in which they were lost.
    before: `type`, `message` and `host` of the loss, by attempt.
    """

    waiting: dict[Key, tuple[Attempt, Slot]] = field(default_factory=dict)
    before: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def again(self, attempt: Attempt, slot: Slot, outcome: Outcome) -> bool:
        """An attempt was lost in `slot`: whether it is made again, which it is once."""
        if attempt.key in self.before:
            return False
        host = {"host": outcome.machine.host} if outcome.machine else {}
        self.before[attempt.key] = {name: outcome.detail.get(name) for name in ("type", "message")} | host
        self.waiting[attempt.key] = attempt, slot
        return True

    def placed(self, free: Sequence[Slot], slots: Sequence[Slot]) -> Iterator[tuple[Attempt, Slot]]:
        """Those that can begin again now, each with a slot of `free`; the one in which it was lost is taken only where
        `slots`, busy ones included, has no other for it."""
        left = list(free)
        for key, (attempt, former) in list(self.waiting.items()):
            fitting = [slot for slot in slots if kind_of(attempt.cell) in slot.kinds]
            others = [slot for slot in fitting if slot.name != former.name] or fitting
            if chosen := next((slot for slot in left if slot in others), None):
                left.remove(chosen)
                del self.waiting[key]
                yield attempt, chosen

    def told(self, outcome: Outcome) -> Outcome:
        """The outcome with the loss before it, if there was one, under `retried_after` of its detail."""
        before = self.before.get((outcome.job.cell.cell_id, outcome.job.repeat))
        return replace(outcome, detail=outcome.detail | {"retried_after": before}) if before else outcome
