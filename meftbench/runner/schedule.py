"""Decides which cell is next, as a pure function of the plan and of what has finished: no clock, files or processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from meftbench.plan.cell import Cell
from meftbench.records.record import Status

Key = tuple[str, int]  # cell_id, repeat
OnOom = Literal["record", "bracket", "skip-larger"]

# The fields that make a cell larger: all else being equal, peak memory grows with each of them.
SIZES = ("batch_size", "micro_batch_size", "sequence_length")
_BATCH = ("batch_size", "micro_batch_size")


@dataclass(frozen=True)
class Attempt:
    """A cell to run, for the `repeat`-th time.

    dominated_by: cell_id of the `oom` cell because of which it is skipped.  beaten_by: cell_id of the cell whose
        better learning rate makes this one unnecessary.
    """

    cell: Cell
    repeat: int
    dominated_by: str | None = None
    beaten_by: str | None = None

    @property
    def is_skipped(self) -> bool:
        return self.dominated_by is not None or self.beaten_by is not None

    @property
    def key(self) -> Key:
        return self.cell.cell_id, self.repeat


@dataclass(frozen=True)
class Plan:
    """All cells in their order, how often each is run, and what an `oom` means for larger ones.

    repeats: by cell_id; a cell that is not in it is not run, but its earlier status is taken into account.
    """

    cells: Sequence[Cell]
    repeats: Mapping[str, int]
    on_oom: OnOom = "bracket"

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Every cell once, then every cell again, so that a drift of the machine affects all cells alike."""
        rounds = range(max(self.repeats.values(), default=0))
        return [Attempt(cell, n) for n in rounds for cell in self.cells if n < self.repeats.get(cell.cell_id, 0)]

    @cached_property
    def places(self) -> dict[Key, int]:
        """The place of each attempt in their order."""
        return {attempt.key: place for place, attempt in enumerate(self.attempts)}


def pending(plan: Plan, finished: Mapping[Key, Status], running: Collection[Key] = ()) -> list[Attempt]:
    """The attempts that are neither finished nor running, in the order of the plan."""
    return [attempt for attempt in plan.attempts if attempt.key not in finished and attempt.key not in running]


class Schedule:
    """What is left of a plan. It changes as attempts start and end, in a time that does not depend on how many are
    left.

    finished: the status of attempts that have ended, in an earlier execution.  running: attempts that are not to be
    started.  kind: of the device that a cell needs, so that cells for which there is no room are not gone through.
    """

    def __init__(
        self,
        plan: Plan,
        finished: Mapping[Key, Status],
        running: Collection[Key] = (),
        kind: Callable[[Cell], str] = lambda cell: "",
    ) -> None:
        self._plan, self._kind = plan, kind
        self._cells = {cell.cell_id: cell for cell in plan.cells}
        self._left: dict[str, dict[Key, Attempt]] = {}
        for attempt in pending(plan, finished, running):
            self._left.setdefault(kind(attempt.cell), {})[attempt.key] = attempt
        self._failing: dict[str, list[Cell]] = {}  # cells that are out of memory, by what they share with larger ones
        self._fitting: dict[str, list[Cell]] = {}  # cells that fit, by what they share with those of other batches
        self._of_batch: dict[str, dict[Key, Attempt]] | None = None  # what is left, by the same
        self._texts: dict[tuple[str, tuple[str, ...]], str] = {}
        for key, status in finished.items():
            self.end(key, status)

    def end(self, key: Key, status: Status) -> None:
        """An attempt has ended."""
        cell = self._cells.get(key[0])
        if cell is None or self._plan.on_oom == "record":
            return
        if status == "oom":
            self._failing.setdefault(self._shared(cell, SIZES), []).append(cell)
        elif status == "ok" and self._plan.on_oom == "bracket":
            self._fitting.setdefault(self._shared(cell, _BATCH), []).append(cell)

    def start(self, among: Collection[str] | None = None) -> Attempt | None:
        """The next attempt to make, or to skip (`dominated_by` is set), which is then no longer left; None where
        nothing is left to start. among: the kinds of devices for which there is room; None: all."""
        attempt = self.next(among)
        if attempt is not None:
            del self._left[self._kind(attempt.cell)][attempt.key]
            if self._of_batch is not None:
                del self._of_batch[self._shared(attempt.cell, _BATCH)][attempt.key]
        return attempt

    def next(self, among: Collection[str] | None = None) -> Attempt | None:
        """What `start` would return."""
        firsts = [
            next(iter(left.values())) for kind, left in self._left.items() if left and (among is None or kind in among)
        ]
        if not firsts:
            return None
        first = firsts[0] if len(firsts) == 1 else min(firsts, key=self._place)
        if not self._failing:
            return first
        same = self._failing.get(self._shared(first.cell, SIZES), ())
        if smaller := next((cell for cell in same if dominates(cell, first.cell)), None):
            return Attempt(first.cell, first.repeat, smaller.cell_id)
        return self._middle(first) if self._plan.on_oom == "bracket" else first

    def _shared(self, cell: Cell, axes: tuple[str, ...]) -> str:
        """What cells share that differ in `axes` alone, as text."""
        key = cell.cell_id, axes
        if key not in self._texts:
            self._texts[key] = cell.model_dump_json(exclude=set(axes))
        return self._texts[key]

    def _place(self, attempt: Attempt) -> int:
        return self._plan.places[attempt.key]

    def _middle(self, first: Attempt) -> Attempt:
        """The attempt with the middle batch size between the largest that fits and the smallest that is out of memory.

        Only cells that differ from `first` in nothing but the batch are considered. The boundary is found by bisection,
        after few attempts; `first` where no batch size is known to fit, none is known to fail, or none is between them.
        """
        shared = self._shared(first.cell, _BATCH)
        fits = [cell.micro_batch_size for cell in self._fitting.get(shared, ())]
        fails = [
            cell.micro_batch_size
            for cell in self._failing.get(self._shared(first.cell, SIZES), ())
            if self._shared(cell, _BATCH) == shared
        ]
        if not fits or not fails:
            return first
        if self._of_batch is None:
            self._of_batch = {}
            for left in self._left.values():
                for key, attempt in left.items():
                    self._of_batch.setdefault(self._shared(attempt.cell, _BATCH), {})[key] = attempt
        low, high = max(fits), min(fails)
        between = [
            attempt
            for attempt in self._of_batch.get(shared, {}).values()
            if attempt.repeat == first.repeat and low < attempt.cell.micro_batch_size < high
        ]
        between.sort(key=lambda attempt: (attempt.cell.micro_batch_size, attempt.cell.batch_size))
        return between[(len(between) - 1) // 2] if between else first


def next_attempt(
    plan: Plan,
    finished: Mapping[Key, Status],
    running: Collection[Key] = (),
    among: Callable[[Cell], bool] = lambda cell: True,
) -> Attempt | None:
    """The next attempt to make, or to skip (`dominated_by` is set); None where nothing is left to start.

    finished: the status of attempts that have ended, in this execution or an earlier one.
    among: whether there is room for a cell.
    """
    schedule = Schedule(plan, finished, running, lambda cell: "room" if among(cell) else "")
    return schedule.next({"room"})


def dominates(smaller: Cell, larger: Cell) -> bool:
    """Whether `larger` needs at least the memory of `smaller`: only sizes differ, and none is below `smaller`'s."""
    return rest(smaller, SIZES) == rest(larger, SIZES) and all(
        getattr(smaller, size) <= getattr(larger, size) for size in SIZES
    )


def rest(cell: Cell, axes: Sequence[str]) -> dict[str, Any]:
    """The fields of a cell without `axes`."""
    return cell.model_dump(exclude=set(axes))
