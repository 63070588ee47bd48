"""Compares predicted memory with what a GPU measured: how large the errors are, and for which kind of cell."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from meftbench.catalogue.labels import parts_of_older
from meftbench.catalogue.profiles import PREDICTED, PROFILES, Profile, find_profile
from meftbench.catalogue.validated import about_validation
from meftbench.documents import LARGEST, json_object_of
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
    """One metric of one cell, as measured and as predicted, in bytes.

    method: the label of the method; method_name: its name alone, without levers and settings.
    attention: the implementation that was used, where the record has it; otherwise the requested one.
    """

    label: str
    method: str
    precision: str
    attention: str
    metric: str
    measured: int
    predicted: int
    method_name: str

    @property
    def share(self) -> float:
        """The error as a share of the measured value; negative where the prediction is too low."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Spread:
    """The relative errors of a group of cells. axis: what the cells have in common, one of AXES, or `all`.

    median, worst: of the absolute values.  signed: the median of the errors with their signs.
    """

    metric: str
    axis: str
    name: str
    count: int
    median: float
    worst: float
    signed: float


@dataclass(frozen=True)
class Validation:
    """The errors of the predictions for a run. missing: a line for each cell without a prediction, with the reason."""

    profile: str
    errors: list[Error]
    missing: list[str]


def measured_records(run: Run) -> list[Record]:
    """The finished cells of `run` in which a GPU measured memory. Raises UserError (exit 5): there are none."""
    records = [record for record in run.records if record.status == "ok" and any(_measured(record, m) for m in METRICS)]
    if not records:
        what = f"has no cell with measured {', '.join(METRICS)}"
        raise UserError(str(run.path), what, "name a run taken with --device cuda", NOTHING_MATCHED)
    return records


def protocol_for(run: Run) -> Protocol:
    """The protocol for predicting what `run` measured: one step, with those settings of the run's protocol that change
    memory (allocator, memory limit, padding). Raises UserError: the run's protocol is damaged."""
    recorded = run.suite.get("protocol") or {}
    settings = {name: recorded[name] for name in ("allocator", "memory_limit", "padding") if name in recorded}
    try:
        return Protocol(**settings, warmup=1, steps=1, repeats=1, passes=("memory",), on_oom="record")
    except ValidationError as error:
        what = f"has a damaged protocol ({error.errors()[0]['msg']})"
        raise UserError(str(run.path), what, "run the suite again") from None


def profile_of(run: Run) -> Profile:
    """The shipped profile of the device that `run` was measured on.

    Raises UserError: the run names no device, several, or one without a profile.
    """
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
    fields = {name: value for name, value in record.cell.items() if name in Cell.model_fields}
    fields |= {"model_config_overrides": record.cell.get("model_config") or {}, "device": f"predicted:{profile}"}
    return Cell.model_validate(fields)


def validate(
    run: Run,
    profile: str,
    tell: Callable[[str], None] = lambda line: None,
    most: int | None = None,
    allow_code: bool = False,
) -> Validation:
    """Predict the cells that `run` measured, one after the other in separate processes, and compare.

    allow_code: whether functions of the user's own that make models and batches may be imported.
    most: predict at most so many cells, evenly spread over the run; None: all.  tell: called with lines of progress.
    Raises UserError: nothing was measured (exit 5), or the run's protocol is damaged.
    """
    from meftbench.runner import run_suite

    measured = measured_records(run)
    cells = {record.cell_id: predicted_cell(record, profile) for record in measured}
    chosen = list(cells)[:: max(1, -(-len(cells) // most))] if most else list(cells)
    measured = [record for record in measured if record.cell_id in chosen]
    tell(f"predicting {len(chosen)} cell{'s' * (len(chosen) != 1)} on {profile}")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite("validate", "", protocol_for(run), tuple(cells[cell_id] for cell_id in chosen), None)
        suite = replace(suite, allow_code=allow_code)
        predicted = {record.cell_id: record for record in run_suite(suite, Path(folder) / "run").records}
    return Validation(profile, errors(measured, predicted, profile), without(measured, predicted, profile))


def errors(measured: Iterable[Record], predicted: Mapping[str, Record], profile: str) -> list[Error]:
    """The error of each metric that a cell has both measured (the median of its repeats) and predicted.

    predicted: records of the cells on `profile`, by cell_id.
    """
    result = []
    for outcome in collect(measured):
        record = outcome.records[-1]
        prediction = predicted.get(predicted_cell(record, profile).cell_id)
        for metric in METRICS:
            values = [value for repeat in outcome.records if (value := _measured(repeat, metric))]
            predicted_value = prediction.value(metric) if prediction else None
            if values and isinstance(predicted_value, int):
                attention = str(record.cell.get("attention_used") or record.cell["attention_requested"])
                result.append(
                    Error(
                        label=record.label,
                        method=record.method_label,
                        precision=str(record.cell["precision"]),
                        attention=attention,
                        metric=metric,
                        measured=round(median(values)),
                        predicted=predicted_value,
                        method_name=str(record.cell["method"]),
                    )
                )
    return result


def without(measured: Iterable[Record], predicted: Mapping[str, Record], profile: str) -> list[str]:
    """A line for each cell that has no prediction: the status that its prediction ended with, and the reason."""
    lines = {}
    for record in measured:
        prediction = predicted[predicted_cell(record, profile).cell_id]
        if prediction.status != "ok":
            lines[record.label] = (
                f"{record.label}: {prediction.status}: {prediction.status_detail.get('message', 'no reason')}"
            )
    return list(lines.values())


def spreads(all_errors: list[Error]) -> list[Spread]:
    """For each metric: the spread of all errors, then of each group along each axis, in order of appearance."""
    result = []
    for metric in METRICS:
        of_metric = [error for error in all_errors if error.metric == metric]
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
    """Write FILE into the run's folder. Raises UserError where it cannot be written."""
    file = run.path / FILE
    write_whole(file, json.dumps(as_json(validation), indent=1, ensure_ascii=False) + "\n")
    return file


def _check(error: Error) -> None:
    """Raises ValueError: a field of an error has another type, or is not of those that are validated."""
    for name, value in vars(error).items():
        counted = name in ("measured", "predicted")
        if counted and not (type(value) is int and 0 < value < LARGEST):
            raise ValueError(f"{name} is no number of bytes")
        if not counted and type(value) is not str:
            raise ValueError(f"{name} is no text")
    if error.metric not in METRICS:
        raise ValueError(f"metric is none of {', '.join(METRICS)}")


_CURE = "write it again with `meftbench validate --save`"


def saved(run: Run) -> Validation | None:
    """What `save` wrote; None where there is no such file. Raises UserError: the file is damaged."""
    file = run.path / FILE
    if not os.path.lexists(file):
        return None
    content = json_object_of(file, cure=_CURE)
    try:
        fields = Error.__dataclass_fields__
        # Files that were written before there was the field have the name in the label alone.
        full = [{"method_name": parts_of_older(row["method"])[0].name, **row} for row in content["errors"]]
        rows = [Error(**{key: value for key, value in row.items() if key in fields}) for row in full]
        for row in rows:
            _check(row)
        return Validation(str(content["profile"]), rows, [str(line) for line in content["not_predicted"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(file), f"is damaged ({error})", _CURE) from None


def predicted_for(run: Run) -> dict[str, str]:
    """By name of each profile that `run` predicts for: what its predictions were held against, as a sentence."""
    devices = {str(record.cell.get("device")) for record in run.records}
    names = sorted(name.removeprefix(PREDICTED) for name in devices if name.startswith(PREDICTED))
    return {name: about_validation(PROFILES[name]) if name in PROFILES else "its profile is gone" for name in names}


def _spread(metric: str, axis: str, name: str, group: list[Error]) -> Spread:
    shares = [error.share for error in group]
    sizes = [abs(share) for share in shares]
    return Spread(metric, axis, name, len(group), median(sizes), max(sizes), median(shares))


def _measured(record: Record, metric: str) -> int | None:
    entry = record.metrics.get(metric)
    return entry.value if entry and entry.source == "measured" and isinstance(entry.value, int) else None
