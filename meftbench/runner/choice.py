"""Decides which learning rates still need a training: a pure function of the plan and of the scores so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from meftbench.plan.cell import Cell


class Rates:
    """The trainings of a plan that differ in learning rate and seed alone. cells: of the plan, in order."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells

    def better(self, cell: Cell, scores: Mapping[str, float]) -> Cell | None:
        """The first seed's cell with the best learning rate, where `cell` has another and need not be trained; else
        None.

        Unless the grid is "every-seed", all learning rates are tried with the lowest seed, and the other seeds are
        trained with the best of them only.  scores: of validation, by cell_id.  None: `cell` is to be trained, because
        it has the lowest seed or the best learning rate, or because a learning rate has no score with the lowest seed.
        """
        if cell.training is None or cell.training.grid == "every-seed":
            return None
        first_seed_cells = self._of_first_seed[_without_rate_and_seed(cell)]
        is_first = cell.seed == first_seed_cells[0].seed
        if is_first or any(candidate.cell_id not in scores for candidate in first_seed_cells):
            return None
        best = max(first_seed_cells, key=lambda candidate: scores[candidate.cell_id])
        return None if _rate(best) == _rate(cell) else best

    @cached_property
    def _of_first_seed(self) -> dict[str, list[Cell]]:
        """The cells with the lowest seed, by what cells share that differ in learning rate and seed alone."""
        found: dict[str, list[Cell]] = {}
        for cell in self._cells:
            if cell.training is not None:
                same = found.setdefault(_without_rate_and_seed(cell), [cell])
                if cell.seed < same[0].seed:
                    same[:] = [cell]
                elif cell.seed == same[0].seed and cell is not same[0]:
                    same.append(cell)
        return found


def _without_rate_and_seed(cell: Cell) -> str:
    return cell.model_dump_json(exclude={"seed": True, "training": {"learning_rate"}})


def _rate(cell: Cell) -> float | None:
    return cell.training.learning_rate if cell.training else None
