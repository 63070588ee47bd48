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


def pending(plan: Plan, finished: Mapping[Key, Status], running: Collection[Key] = ()) -> list[Attempt]:
    """The attempts that are neither finished nor running, in the order of the plan."""
    return [attempt for attempt in plan.attempts if attempt.key not in finished and attempt.key not in running]


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
    startable = [attempt for attempt in pending(plan, finished, running) if among(attempt.cell)]
    if not startable:
        return None
    if plan.on_oom == "record":
        return startable[0]
    cells = {cell.cell_id: cell for cell in plan.cells}
    failing = [cells[cell_id] for (cell_id, _), status in finished.items() if status == "oom" and cell_id in cells]
    first = startable[0]
    if smaller := next((cell for cell in failing if dominates(cell, first.cell)), None):
        return Attempt(first.cell, first.repeat, smaller.cell_id)
    if plan.on_oom == "bracket":
        fitting = [cells[cell_id] for (cell_id, _), status in finished.items() if status == "ok" and cell_id in cells]
        return _middle(first, startable, fitting, failing)
    return first


def dominates(smaller: Cell, larger: Cell) -> bool:
    """Whether `larger` needs at least the memory of `smaller`: only sizes differ, and none is below `smaller`'s."""
    return rest(smaller, SIZES) == rest(larger, SIZES) and all(
        getattr(smaller, size) <= getattr(larger, size) for size in SIZES
    )


def rest(cell: Cell, axes: Sequence[str]) -> dict[str, Any]:
    """The fields of a cell without `axes`."""
    return cell.model_dump(exclude=set(axes))


def _middle(first: Attempt, startable: list[Attempt], fitting: list[Cell], failing: list[Cell]) -> Attempt:
    """The attempt with the middle batch size between the largest that fits and the smallest that is out of memory.

    Only cells that differ from `first` in nothing but the batch are considered. The boundary is found by bisection,
    after few attempts; `first` where no batch size is known to fit, none is known to fail, or none is between them.
    """
    axes = ("batch_size", "micro_batch_size")
    other_fields = rest(first.cell, axes)
    fits = [cell.micro_batch_size for cell in fitting if rest(cell, axes) == other_fields]
    fails = [cell.micro_batch_size for cell in failing if rest(cell, axes) == other_fields]
    if not fits or not fails:
        return first
    low, high = max(fits), min(fails)
    between = [
        attempt
        for attempt in startable
        if attempt.repeat == first.repeat
        and low < attempt.cell.micro_batch_size < high
        and rest(attempt.cell, axes) == other_fields
    ]
    between.sort(key=lambda attempt: (attempt.cell.micro_batch_size, attempt.cell.batch_size))
    return between[(len(between) - 1) // 2] if between else first
