"""Predictions held against what a GPU measured: how far off they are, and for which kind of cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from meftbench.errors import NOTHING_MATCHED, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.profiles import PROFILES, Profile, find_profile
from meftbench.records.record import Record
from meftbench.records.store import Run

METRICS = ("peak_allocated_bytes", "activation_peak_bytes", "peak_reserved_bytes")
AXES = ("method", "precision", "attention")


@dataclass(frozen=True)
class Error:
    """One number of one cell: what was measured, what was predicted.

    attention: the kernel that ran, where the record says so; what was asked for otherwise.
    """

    label: str
    method: str
    precision: str
    attention: str
    metric: str
    measured: int
    predicted: int

    @property
    def share(self) -> float:
        """Predicted above measured, as a share of measured; negative where too little was predicted."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Spread:
    """Errors of a group. axis: one of AXES, or `all`.  median, worst: without the sign.  signed: the median with it."""

    metric: str
    axis: str
    name: str
    count: int
    median: float
    worst: float
    signed: float


def measured_records(run: Run) -> list[Record]:
    """The finished cells of `run` in which a GPU measured memory. Raises UserError (exit 5): there are none."""
    found = [record for record in run.records if record.status == "ok" and any(_measured(record, m) for m in METRICS)]
    if not found:
        what = f"has no cell with measured {', '.join(METRICS)}"
        raise UserError(str(run.path), what, "name a run taken with --device cuda", NOTHING_MATCHED)
    return found


def profile_of(run: Run) -> Profile:
    """The shipped profile of the device that `run` was taken on. Raises UserError: it names none, or one without."""
    devices = run.environment.get("gpus", {}).get("devices") or []
    names = {str(device.get("name")) for device in devices}
    if len(names) != 1:
        what = f"names {'several devices' if names else 'no device'} in environment.json"
        raise UserError(str(run.path), what, "choose one with --profile")
    (name,) = names
    for profile in PROFILES.values():
        if profile.device == name:
            return profile
    cure = "choose one with --profile (`meftbench list profiles`), or write a file with the same keys"
    raise UserError(str(run.path), f"was taken on {name}, which has no profile", cure)


def predicted_cell(record: Record, profile: str) -> Cell:
    """The cell of `record` on the device of `profile`. Raises UserError: there is no such profile."""
    find_profile(profile, "--profile")
    said = {name: value for name, value in record.cell.items() if name in Cell.model_fields}
    said |= {"model_config_overrides": record.cell.get("model_config") or {}, "device": f"predicted:{profile}"}
    return Cell.model_validate(said)


def errors(measured: Iterable[Record], predicted: Mapping[str, Record], profile: str) -> list[Error]:
    """Every number that both have. predicted: by cell_id, on the device of `profile`."""
    found = []
    for record in measured:
        other = predicted.get(predicted_cell(record, profile).cell_id)
        for metric in METRICS:
            before, after = _measured(record, metric), other.value(metric) if other else None
            if before and isinstance(after, int):
                attention = str(record.cell.get("attention_used") or record.cell["attention_requested"])
                precision = str(record.cell["precision"])
                found.append(Error(record.label, record.method_label, precision, attention, metric, before, after))
    return found


def without(measured: Iterable[Record], predicted: Mapping[str, Record], profile: str) -> list[str]:
    """A line for each cell that has no prediction: how predicting it ended, and why."""
    lines = {}
    for record in measured:
        other = predicted[predicted_cell(record, profile).cell_id]
        if other.status != "ok":
            lines[record.label] = f"{record.label}: {other.status}: {other.status_detail.get('message', 'no reason')}"
    return list(lines.values())


def spreads(found: list[Error]) -> list[Spread]:
    """Of each metric: all errors, then by each axis in the order in which names come."""
    result = []
    for metric in METRICS:
        of_metric = [error for error in found if error.metric == metric]
        if of_metric:
            result.append(_spread(metric, "all", "all", of_metric))
        for axis in AXES:
            for name in dict.fromkeys(getattr(error, axis) for error in of_metric):
                group = [error for error in of_metric if getattr(error, axis) == name]
                result.append(_spread(metric, axis, name, group))
    return result


def text(found: list[Error], missing: list[str]) -> str:
    """A table of the spreads, the worst cell of each metric, and the cells without a prediction."""
    rows = spreads(found)
    width = max(len(row.name) for row in rows)
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows):
        of_metric = [error for error in found if error.metric == metric]
        worst = max(of_metric, key=lambda error: abs(error.share))
        lines += [f"{metric}: predicted against measured", f"  {'':<{width + 10}} cells  median   worst  signed"]
        for row in (row for row in rows if row.metric == metric):
            kind = f"{'' if row.axis == 'all' else row.axis:<9} {row.name:<{width}}"
            lines.append(f"  {kind} {row.count:>5} {row.median:>7.2%} {row.worst:>7.2%} {row.signed:>+7.2%}")
        lines.append(f"  worst: {worst.label}: {worst.measured:,} measured, {worst.predicted:,} predicted bytes")
    return "\n".join(lines + [f"not predicted: {line}" for line in missing])


def as_json(found: list[Error], missing: list[str], profile: str) -> dict[str, Any]:
    return {
        "profile": profile,
        "spreads": [vars(row) for row in spreads(found)],
        "errors": [vars(error) | {"share": error.share} for error in found],
        "not_predicted": missing,
    }


def _spread(metric: str, axis: str, name: str, group: list[Error]) -> Spread:
    shares = [error.share for error in group]
    sizes = [abs(share) for share in shares]
    return Spread(metric, axis, name, len(group), median(sizes), max(sizes), median(shares))


def _measured(record: Record, metric: str) -> int | None:
    found = record.metrics.get(metric)
    return found.value if found and found.source == "measured" and isinstance(found.value, int) else None
