"""Predictions held against what a GPU measured: how far off they are, and for which kind of cell."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from meftbench.catalogue.profiles import PREDICTED, PROFILES, Profile, find_profile
from meftbench.errors import NOTHING_MATCHED, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite
from meftbench.records.outcome import collect
from meftbench.records.record import Record
from meftbench.records.store import Run, write_whole

METRICS = ("peak_allocated_bytes", "activation_peak_bytes", "peak_reserved_bytes")
FILE = "validation.json"
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


@dataclass(frozen=True)
class Validation:
    """What holding a run against predictions gave. missing: a line for each cell without a prediction, and why."""

    profile: str
    errors: list[Error]
    missing: list[str]


def measured_records(run: Run) -> list[Record]:
    """The finished cells of `run` in which a GPU measured memory. Raises UserError (exit 5): there are none."""
    found = [record for record in run.records if record.status == "ok" and any(_measured(record, m) for m in METRICS)]
    if not found:
        what = f"has no cell with measured {', '.join(METRICS)}"
        raise UserError(str(run.path), what, "name a run taken with --device cuda", NOTHING_MATCHED)
    return found


def protocol_for(run: Run) -> Protocol:
    """How to predict what `run` measured: one step, and of the run's protocol what changes memory (allocator, memory
    limit, padding). Raises UserError: its protocol is damaged."""
    given = run.suite.get("protocol") or {}
    kept = {name: given[name] for name in ("allocator", "memory_limit", "padding") if name in given}
    try:
        return Protocol(**kept, warmup=1, steps=1, repeats=1, passes=("memory",), on_oom="record")
    except ValidationError as error:
        what = f"has a damaged protocol ({error.errors()[0]['msg']})"
        raise UserError(str(run.path), what, "run the suite again") from None


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


def validate(
    run: Run,
    profile: str,
    tell: Callable[[str], None] = lambda line: None,
    most: int | None = None,
    allow_code: bool = False,
) -> Validation:
    """Predicts the cells that `run` measured, one after the other in processes of their own, and holds them against it.

    allow_code: whether functions of the user's own that make models and batches may be imported.
    most: cells, evenly spread over the run; None: all.  tell: is given a line of progress.
    Raises UserError: nothing was measured (exit 5), or the run's protocol is damaged.
    """
    from meftbench.runner import run_suite

    measured = measured_records(run)
    again = {record.cell_id: predicted_cell(record, profile) for record in measured}
    kept = list(again)[:: max(1, -(-len(again) // most))] if most else list(again)
    measured = [record for record in measured if record.cell_id in kept]
    tell(f"predicting {len(kept)} cell{'s' * (len(kept) != 1)} on {profile}")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite("validate", "", protocol_for(run), tuple(again[cell_id] for cell_id in kept), None)
        suite = replace(suite, allow_code=allow_code)
        predicted = {record.cell_id: record for record in run_suite(suite, Path(folder) / "run").records}
    return Validation(profile, errors(measured, predicted, profile), without(measured, predicted, profile))


def errors(measured: Iterable[Record], predicted: Mapping[str, Record], profile: str) -> list[Error]:
    """Every number that both have, one a cell: of several repeats the median. predicted: by cell_id, on `profile`."""
    found = []
    for outcome in collect(measured):
        record = outcome.records[-1]
        other = predicted.get(predicted_cell(record, profile).cell_id)
        for metric in METRICS:
            taken = [value for one in outcome.records if (value := _measured(one, metric))]
            after = other.value(metric) if other else None
            if taken and isinstance(after, int):
                attention = str(record.cell.get("attention_used") or record.cell["attention_requested"])
                precision = str(record.cell["precision"])
                before = round(median(taken))
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


def as_json(validation: Validation) -> dict[str, Any]:
    return {
        "profile": validation.profile,
        "spreads": [vars(row) for row in spreads(validation.errors)],
        "errors": [vars(error) | {"share": error.share} for error in validation.errors],
        "not_predicted": validation.missing,
    }


def save(run: Run, validation: Validation) -> Path:
    """Write FILE into the run's folder. Raises UserError where that cannot be."""
    file = run.path / FILE
    write_whole(file, json.dumps(as_json(validation), indent=1, ensure_ascii=False) + "\n")
    return file


def saved(run: Run) -> Validation | None:
    """What `save` wrote; None where nothing did. Raises UserError: the file is damaged."""
    file = run.path / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = Error.__dataclass_fields__
        rows = [Error(**{key: value for key, value in row.items() if key in known}) for row in content["errors"]]
        return Validation(str(content["profile"]), rows, [str(line) for line in content["not_predicted"]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(file), f"is damaged ({error})", "write it again with `meftbench validate --save`") from None


def unverified(run: Run) -> list[str]:
    """The devices that predictions of `run` are for and that nobody has held against one, as their profiles name them;
    a profile that is not there any more counts as unverified."""
    devices = {str(record.cell.get("device")) for record in run.records}
    names = sorted(name.removeprefix(PREDICTED) for name in devices if name.startswith(PREDICTED))
    return [name for name in names if not (name in PROFILES and PROFILES[name].verified)]


def _spread(metric: str, axis: str, name: str, group: list[Error]) -> Spread:
    shares = [error.share for error in group]
    sizes = [abs(share) for share in shares]
    return Spread(metric, axis, name, len(group), median(sizes), max(sizes), median(shares))


def _measured(record: Record, metric: str) -> int | None:
    found = record.metrics.get(metric)
    return found.value if found and found.source == "measured" and isinstance(found.value, int) else None
