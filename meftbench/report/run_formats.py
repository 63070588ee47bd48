"""A run for machines: its records, its table, JUnit, and what trackers of benchmarks read (docs/measuring.md 3).

A cell that did not end ok has no number in any of them: out of memory is never 0.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import METRICS, Kind
from meftbench.catalogue.profiles import PREDICTED
from meftbench.errors import UserError
from meftbench.records.outcome import Figure, Outcome, as_number, outcomes
from meftbench.records.store import Run
from meftbench.report.formats import Case, junit
from meftbench.report.tables import as_csv, detail_of, frame_of
from meftbench.verdicts.environment import machine

if TYPE_CHECKING:
    from pandas import DataFrame

# What a tracker draws a line of, where no metric is named.
TRACKED = ("activation_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "step_time_s", "tokens_per_s")


@dataclass(frozen=True)
class Tracked:
    """One number of one cell. name: the cell's label, made unique within the run."""

    name: str
    outcome: Outcome
    metric: str
    figure: Figure

    @property
    def kind(self) -> Kind:
        return METRICS[self.metric]


def run_csv(run: Run) -> str:
    """The table that `report` writes: a row a cell, a unit in each metric's heading, its source beside it."""
    return as_csv(frame_of(run)).rstrip("\n")


def run_json(run: Run) -> str:
    """One object: `suite` and `environment` as the run folder has them, and `records`."""
    content = {"suite": run.suite, "environment": run.environment, "records": [r.to_json() for r in run.records]}
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)


def run_parquet(run: Run) -> bytes:
    """The table's columns, numbers as numbers; `units` of the metrics are in the file's pandas metadata.

    Raises UserError where pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UserError("--format parquet", "needs pyarrow", "pip install 'meftbench[parquet]'")
    frame = _typed(frame_of(run))
    frame.attrs["units"] = {name: METRICS[name].unit for name in frame.columns if name in METRICS}
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False)
    return stream.getvalue()


def _typed(frame: DataFrame) -> DataFrame:
    """Each column of one type; lists and mappings, which differ from row to row, as JSON."""

    def plain(value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value

    return frame.map(plain).infer_objects().convert_dtypes()


def run_junit(run: Run) -> str:
    """A test case a cell: out of memory is a failure, another bad end an error; its numbers are properties."""
    named = dict(_named(run))
    cases = []
    for name, outcome in named.items():
        tag = {"ok": None, "skipped": "skipped", "oom": "failure"}.get(outcome.status, "error")
        numbers = [(metric, figure) for metric in METRICS if (figure := outcome.figure(metric))]
        properties = {m: f"{figure.value} {METRICS[m].unit} ({figure.source})" for m, figure in numbers}
        wall = sum(record.wall_s for record in outcome.records)
        message = f"{outcome.status}: {detail_of(outcome.worst)}".rstrip(": ")
        cases.append(Case(name, wall, properties, tag, message, outcome.status))
    return junit(run.name, cases)


def github_action_benchmark(run: Run, metrics: Sequence[str]) -> dict[str, str]:
    """For the action's tools `customSmallerIsBetter` and `customBiggerIsBetter`, by the end of the file's name; one
    without a number is left out.

    Source: github.com/benchmark-action/github-action-benchmark, README: name, unit, value, range, extra.
    """
    found: dict[str, list[dict[str, Any]]] = {"smaller": [], "bigger": []}
    for number in _tracked(run, metrics):
        figure, unit = number.figure, number.kind.unit
        entry = {"name": f"{number.name}: {number.metric}", "unit": unit, "value": figure.value}
        if figure.low is not None and figure.high is not None and figure.low != figure.high:
            entry["range"] = f"{figure.low} to {figure.high}"
        entry["extra"] = f"{figure.source} on {_where(run, number.outcome)}"
        found["bigger" if number.kind.better == "higher" else "smaller"].append(entry)
    return {side: json.dumps(entries, indent=1, ensure_ascii=False) for side, entries in found.items() if entries}


def bencher_metric_format(run: Run, metrics: Sequence[str]) -> str:
    """Bencher's: benchmark, measure, value and its bounds. Source: bencher.dev/docs/reference/bencher-metric-format."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number in _tracked(run, metrics):
        figure = number.figure
        bounds = {"lower_value": figure.low, "upper_value": figure.high}
        values = {"value": figure.value} | {name: value for name, value in bounds.items() if value is not None}
        found.setdefault(number.name, {})[number.metric] = values
    return json.dumps(found, indent=1, ensure_ascii=False)


def pytorch_v3(run: Run, metrics: Sequence[str]) -> str:
    """Rows of PyTorch's `oss_ci_benchmark_v3`, one a metric and cell; a value a repeat.

    Source: the wiki page "PyTorch OSS benchmark infra" of pytorch/pytorch.
    """
    rows = []
    for number in _tracked(run, metrics):
        last = number.outcome.records[-1]
        cell = {key: value for key, value in last.cell.items() if key not in ("model", "precision", "label")}
        values = [as_number(record.value(number.metric)) for record in number.outcome.records]
        rows.append(
            {
                "benchmark": {
                    "name": f"meftbench {run.name}",
                    "mode": "training",
                    "dtype": last.cell["precision"],
                    "extra_info": {"run_id": run.run_id, "protocol_id": last.protocol_id, "cell": cell},
                },
                "model": {"name": last.model_label, "type": number.name, "backend": last.method_label},
                "metric": {
                    "name": number.metric,
                    "benchmark_values": [value for value in values if value is not None],
                    "extra_info": {"unit": number.kind.unit, "source": number.figure.source},
                },
                "runners": [{"name": last.host, "type": _where(run, number.outcome)}],
                "dependencies": {
                    name: {"version": str(version)} for name, version in run.environment.get("packages", {}).items()
                },
            }
        )
    return json.dumps(rows, indent=1, ensure_ascii=False)


# By the name that `export --format` knows: text of a run, and text of a run's chosen metrics.
WHOLE: dict[str, Callable[[Run], str]] = {"csv": run_csv, "json": run_json, "junit": run_junit}
OF_METRICS: dict[str, Callable[[Run, Sequence[str]], str]] = {"bmf": bencher_metric_format, "pytorch-v3": pytorch_v3}


def _tracked(run: Run, metrics: Sequence[str]) -> Iterator[Tracked]:
    """The numbers that a tracker can hold: infinite and NaN are none."""
    for name, outcome in _named(run):
        for metric in metrics:
            figure = outcome.figure(metric)
            if figure is not None and math.isfinite(figure.value):
                yield Tracked(name, outcome, metric, figure)


def _named(run: Run) -> Iterator[tuple[str, Outcome]]:
    """Cells by label; where two share one (they may differ in the device), with the cell_id."""
    found = outcomes(run)
    labels = [outcome.label for outcome in found]
    for outcome in found:
        alone = labels.count(outcome.label) == 1
        yield outcome.label if alone else f"{outcome.label} [{outcome.cell_id}]", outcome


def _where(run: Run, outcome: Outcome) -> str:
    device = str(outcome.cell.get("device"))
    return device if device.startswith(PREDICTED) else machine(run.environment)
