"""A run for machines: its records, its table, JUnit, and formats of benchmark trackers (docs/measuring.md 3).

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
from meftbench.escapes import json_text
from meftbench.plan.budgets import load_budgets
from meftbench.records.outcome import Figure, Outcome, as_number, outcomes
from meftbench.records.store import Run
from meftbench.report.frame_columns import detail_of
from meftbench.report.render.verdicts import Case, junit
from meftbench.report.results import as_csv, frame_of
from meftbench.verdicts.budgets import budgets_file
from meftbench.verdicts.environment import machine
from meftbench.verdicts.judge import exit_code, judge

if TYPE_CHECKING:
    from pandas import DataFrame

# The metrics that are exported for trackers where the user names none.
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
    """The table that `report` writes: a row per cell, the unit in each metric's heading, its source beside it."""
    return as_csv(frame_of(run)).rstrip("\n")


def run_json(run: Run) -> str:
    """One object: `suite` and `environment` as the run folder has them, and `records`."""
    content = {"suite": run.suite, "environment": run.environment, "records": [r.to_json() for r in run.records]}
    return json_text(json.dumps(content, indent=1, ensure_ascii=False, default=str))


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
    """Each column of one type; lists and mappings, which differ from row to row, as JSON.

    A whole number beyond 64 bits, which a record may hold and no type of Parquet does, is a floating-point number.
    """

    def plain(value: Any) -> Any:
        if type(value) is int and not -(2**63) <= value < 2**63:
            return float(value)
        listed = [part.recorded() for part in value] if isinstance(value, tuple) else value
        return json.dumps(listed, ensure_ascii=False) if isinstance(listed, (list, dict)) else value

    return frame.map(plain).infer_objects().convert_dtypes()


def run_junit(run: Run) -> str:
    """A test case per cell: out of memory is a failure, another bad end an error; its numbers are properties."""
    outcome_by_name = dict(_named_outcomes(run))
    cases = []
    for name, outcome in outcome_by_name.items():
        tag = {"ok": None, "skipped": "skipped", "oom": "failure"}.get(outcome.status, "error")
        numbers = [(metric, figure) for metric in METRICS if (figure := outcome.figure(metric))]
        properties = {m: f"{figure.value} {METRICS[m].unit} ({figure.source})" for m, figure in numbers}
        wall = sum(record.wall_s for record in outcome.records)
        message = f"{outcome.status}: {detail_of(outcome.worst)}".rstrip(": ")
        cases.append(Case(name, wall, properties, tag, message, outcome.status))
    return junit(run.name, cases)


def github_action_benchmark(run: Run, metrics: Sequence[str]) -> dict[str, str]:
    """JSON for the action's tools `customSmallerIsBetter` ("smaller") and `customBiggerIsBetter` ("bigger").

    A tool without any number is left out. The keys end the names of the files.
    Source: github.com/benchmark-action/github-action-benchmark, README: name, unit, value, range, extra.
    """
    entries_by_side: dict[str, list[dict[str, Any]]] = {"smaller": [], "bigger": []}
    for number in _tracked(run, metrics):
        figure, unit = number.figure, number.kind.unit
        entry = {"name": f"{number.name}: {number.metric}", "unit": unit, "value": figure.value}
        if figure.low is not None and figure.high is not None and figure.low != figure.high:
            entry["range"] = f"{figure.low} to {figure.high}"
        entry["extra"] = f"{figure.source} on {_where(run, number.outcome)}"
        entries_by_side["bigger" if number.kind.better == "higher" else "smaller"].append(entry)
    return {
        side: json_text(json.dumps(entries, indent=1, ensure_ascii=False))
        for side, entries in entries_by_side.items()
        if entries
    }


def bencher_metric_format(run: Run, metrics: Sequence[str]) -> str:
    """Bencher's JSON: benchmark, measure, value, bounds. Source: bencher.dev/docs/reference/bencher-metric-format."""
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    for number in _tracked(run, metrics):
        figure = number.figure
        bounds = {"lower_value": figure.low, "upper_value": figure.high}
        values = {"value": figure.value} | {name: value for name, value in bounds.items() if value is not None}
        benchmarks.setdefault(number.name, {})[number.metric] = values
    return json_text(json.dumps(benchmarks, indent=1, ensure_ascii=False))


def pytorch_v3(run: Run, metrics: Sequence[str]) -> str:
    """Rows of PyTorch's `oss_ci_benchmark_v3`, one per metric and cell, with a value per repeat.

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
    return json_text(json.dumps(rows, indent=1, ensure_ascii=False))


def badge(run: Run) -> str:
    """Whether the run holds its suite's budgets, as JSON from which shields.io draws a badge.

    Raises UserError: the suite names no budgets. Source: shields.io/badges/endpoint-badge.
    """
    budgets = load_budgets(budgets_file(run, "write `budgets: FILE` into the suite, and run it"))
    verdicts = judge(run, budgets)
    all_budgets = f"{len(verdicts)} budget{'s' * (len(verdicts) != 1)}"
    over = sum(verdict.state in ("over", "oom") for verdict in verdicts)
    unknown = sum(verdict.fails for verdict in verdicts) - over
    near = sum(verdict.state in ("warned", "waived") for verdict in verdicts)
    if over:
        message, color = f"{over} of {all_budgets} over", "red"
    elif unknown or exit_code(verdicts):
        message, color = f"{unknown or len(verdicts)} of {all_budgets} not measured", "orange"
    elif near:
        message, color = f"{all_budgets} held, {near} near or waived", "yellow"
    else:
        message, color = f"{all_budgets} held", "brightgreen"
    return json.dumps({"schemaVersion": 1, "label": "memory", "message": message, "color": color})


# Functions by the value of `export --format`: the text of a whole run, and of chosen metrics of a run.
WHOLE: dict[str, Callable[[Run], str]] = {"csv": run_csv, "json": run_json, "junit": run_junit, "badge": badge}
OF_METRICS: dict[str, Callable[[Run, Sequence[str]], str]] = {"bmf": bencher_metric_format, "pytorch-v3": pytorch_v3}


def _tracked(run: Run, metrics: Sequence[str]) -> Iterator[Tracked]:
    """The numbers that a tracker can store: infinity and NaN are left out."""
    for name, outcome in _named_outcomes(run):
        for metric in metrics:
            figure = outcome.figure(metric)
            if figure is not None and math.isfinite(figure.value):
                yield Tracked(name, outcome, metric, figure)


def _named_outcomes(run: Run) -> Iterator[tuple[str, Outcome]]:
    """Cells with their labels; where cells share one (they may differ in the device), the cell_id is added."""
    run_outcomes = outcomes(run)
    labels = [outcome.label for outcome in run_outcomes]
    for outcome in run_outcomes:
        unique = labels.count(outcome.label) == 1
        yield outcome.label if unique else f"{outcome.label} [{outcome.cell_id}]", outcome


def _where(run: Run, outcome: Outcome) -> str:
    device = str(outcome.cell.get("device"))
    return device if device.startswith(PREDICTED) else machine(run.environment)
