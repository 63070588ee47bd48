"""Which learning rates are still worth a training: a pure function of the plan and of the scores so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meftbench.plan.cell import Cell


def better_rate(cell: Cell, cells: Sequence[Cell], scores: Mapping[str, float]) -> Cell | None:
    """The cell of the first seed whose learning rate did better than `cell`'s, where the others are to take its best.

    scores: by cell_id, of validation.  None: `cell` is to be trained: its grid is tried with every seed, it is of the
    first seed, its rate is the best there, or a rate has no score there.
    """
    if cell.training is None or cell.training.grid == "every-seed":
        return None
    alike = [other for other in cells if _but_rate_and_seed(other) == _but_rate_and_seed(cell)]
    first = min(other.seed for other in alike)
    tried = [other for other in alike if other.seed == first]
    if cell.seed == first or any(other.cell_id not in scores for other in tried):
        return None
    best = max(tried, key=lambda other: scores[other.cell_id])
    return None if _rate(best) == _rate(cell) else best


def _but_rate_and_seed(cell: Cell) -> tuple[object, object]:
    training = cell.training
    rest = training and training.model_dump(exclude={"learning_rate"})
    return cell.model_dump(exclude={"seed", "training"}), rest


def _rate(cell: Cell) -> float | None:
    return cell.training.learning_rate if cell.training else None
