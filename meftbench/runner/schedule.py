"""Which cell next: a pure function of the plan and of what has finished. No clock, no files, no processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from meftbench.plan.cell import Cell
from meftbench.records.record import Status

Key = tuple[str, int]  # cell_id, repeat
OnOom = Literal["record", "bracket", "skip-larger"]

# What makes a cell larger, other things being equal: peak memory grows with each of them.
SIZES = ("batch_size", "micro_batch_size", "sequence_length")


@dataclass(frozen=True)
class Attempt:
    """A cell to run, for the `repeat`-th time.

    dominated_by: cell_id of the `oom` cell because of which it is not run.  beaten_by: of the cell whose learning rate
        did better.
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

    repeats: by cell_id; a cell that is not named is not run, but what is known of it counts.
    """

    cells: Sequence[Cell]
    repeats: Mapping[str, int]
    on_oom: OnOom = "bracket"

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Every cell once, then every cell again: what drifts on a machine falls on all cells alike."""
        rounds = range(max(self.repeats.values(), default=0))
        return [Attempt(cell, n) for n in rounds for cell in self.cells if n < self.repeats.get(cell.cell_id, 0)]


def pending(plan: Plan, finished: Mapping[Key, Status], running: Collection[Key] = ()) -> list[Attempt]:
    """What is neither finished nor running, in the order of the plan."""
    return [attempt for attempt in plan.attempts if attempt.key not in finished and attempt.key not in running]


def next_attempt(
    plan: Plan,
    finished: Mapping[Key, Status],
    running: Collection[Key] = (),
    among: Callable[[Cell], bool] = lambda cell: True,
) -> Attempt | None:
    """The attempt to make, or to skip (`dominated_by` is set), next; None where nothing is left to start.

    finished: status of what has ended, in this execution or an earlier one.
    among: the cells there is room for.
    """
    left = [attempt for attempt in pending(plan, finished, running) if among(attempt.cell)]
    if not left:
        return None
    if plan.on_oom == "record":
        return left[0]
    cells = {cell.cell_id: cell for cell in plan.cells}
    failing = [cells[cell_id] for (cell_id, _), status in finished.items() if status == "oom" and cell_id in cells]
    first = left[0]
    if smaller := next((cell for cell in failing if dominates(cell, first.cell)), None):
        return Attempt(first.cell, first.repeat, smaller.cell_id)
    if plan.on_oom == "bracket":
        fitting = [cells[cell_id] for (cell_id, _), status in finished.items() if status == "ok" and cell_id in cells]
        return _middle(first, left, fitting, failing)
    return first


def dominates(smaller: Cell, larger: Cell) -> bool:
    """Whether `larger` needs at least what `smaller` needs: the same, with no size below `smaller`'s."""
    return rest(smaller, SIZES) == rest(larger, SIZES) and all(
        getattr(smaller, size) <= getattr(larger, size) for size in SIZES
    )


def rest(cell: Cell, axes: Sequence[str]) -> dict[str, Any]:
    """What a cell is but for `axes`."""
    return cell.model_dump(exclude=set(axes))


def _middle(first: Attempt, left: list[Attempt], fitting: list[Cell], failing: list[Cell]) -> Attempt:
    """Of the batches on `first`'s line that lie between one that fits and one that fails: the middle one.

    So the boundary is known after few attempts. Where the line has no such bracket yet: `first`.
    """
    axes = ("batch_size", "micro_batch_size")
    line = rest(first.cell, axes)
    fits = [cell.micro_batch_size for cell in fitting if rest(cell, axes) == line]
    fails = [cell.micro_batch_size for cell in failing if rest(cell, axes) == line]
    if not fits or not fails:
        return first
    low, high = max(fits), min(fails)
    between = [
        attempt
        for attempt in left
        if attempt.repeat == first.repeat
        and low < attempt.cell.micro_batch_size < high
        and rest(attempt.cell, axes) == line
    ]
    between.sort(key=lambda attempt: (attempt.cell.micro_batch_size, attempt.cell.batch_size))
    return between[(len(between) - 1) // 2] if between else first
