"""A predicted step held against a memory snapshot of a real one, allocation by allocation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.units import format_bytes
from meftbench.verdicts.alignment import aligned

MOST_ROWS = 8  # kinds of allocations that only one of both has


@dataclass(frozen=True)
class Alone:
    """Allocations of one size that only one of both has. origin: the operator, where it is known; else ""."""

    requested_bytes: int
    count: int
    origin: str

    @property
    def total_bytes(self) -> int:
        return self.requested_bytes * self.count


@dataclass(frozen=True)
class SnapshotValidation:
    """A predicted step beside a recorded trace. Sizes are in bytes.

    label, device, rules: the predicted cell, the device whose rules predict, and the versions that they are of.
    recorded, predicted, common: numbers of allocations; those in common have the same sizes in the same order.
    recorded_above_bytes, predicted_above_bytes: the peak allocated above the level before the first allocation.
    only_recorded, only_predicted: what one of both has alone, the most bytes first.
    """

    label: str
    device: str
    rules: str
    recorded: int
    predicted: int
    common: int
    recorded_above_bytes: int
    predicted_above_bytes: int
    only_recorded: list[Alone]
    only_predicted: list[Alone]

    @property
    def error(self) -> float:
        """Of the peak above the beginning, as a share of the recorded one; negative where the prediction is too low."""
        return self.predicted_above_bytes / self.recorded_above_bytes - 1 if self.recorded_above_bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """What `meftbench validate SNAPSHOT MODEL METHOD --json` prints."""
        return asdict(self) | {"error": self.error}


def validate_snapshot(
    snapshot: str, recorded: Mapping[str, Any], predicted: Mapping[str, Any], rules: str = ""
) -> SnapshotValidation:
    """Compare what a snapshot has with a predicted step.

    snapshot: its file, for messages.  recorded: an answer of snapshots.inspection, verb `allocations`.
    rules: the versions of the rules that predicted.
    predicted: an answer of prediction.allocations.
    Raises UserError: the snapshot has no trace, or both differ in so many places that it cannot be the same step.
    """
    real, ours = recorded["requested"], predicted["requested"]
    if not real:
        what = "has no trace of allocations"
        cure = "record one: torch.cuda.memory._record_memory_history() before the step, _dump_snapshot(FILE) after it"
        raise UserError(snapshot, what, cure, NOT_COMPARABLE)
    found = aligned(ours, real)
    if found is None:
        same = sum((Counter(real) & Counter(ours)).values())
        peaks = [format_bytes(each["peak_above_bytes"]) for each in (recorded, predicted)]
        what = (
            f"is of another step: {len(real):,} allocations with a peak of {peaks[0]} above its beginning are recorded "
            f"and {len(ours):,} with {peaks[1]} predicted, of which {same:,} have the same size"
        )
        cure = "name the model, batch, length and precision that it is of, or record one step"
        raise UserError(snapshot, what, cure, NOT_COMPARABLE)
    alone = found.only_first(len(ours))
    return SnapshotValidation(
        label=predicted["label"],
        device=predicted["device"],
        rules=rules,
        recorded=len(real),
        predicted=len(ours),
        common=len(found.pairs),
        recorded_above_bytes=recorded["peak_above_bytes"],
        predicted_above_bytes=predicted["peak_above_bytes"],
        only_recorded=_rows(Counter((real[place], "") for place in found.only_second(len(real)))),
        only_predicted=_rows(Counter((ours[place], predicted["origins"][place]) for place in alone)),
    )


def _rows(counts: Counter[tuple[int, str]]) -> list[Alone]:
    rows = [Alone(size, count, origin) for (size, origin), count in counts.items()]
    return sorted(rows, key=lambda row: -row.total_bytes)[:MOST_ROWS]
