"""A record: everything known about one executed cell, stored as one line of JSON.

Versions of the format (`schema`): 1, the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from meftbench.catalogue.labels import Part, joined, label_of, parts_from, parts_of_older
from meftbench.catalogue.metrics import METRICS
from meftbench.errors import UserError
from meftbench.records.checks import NOT_FINITE, Source, check_metrics, check_origin, check_record

SCHEMA = 1
Status = Literal["ok", "oom", "timeout", "error", "skipped"]
Value = int | float | str | list[Any] | None


@dataclass(frozen=True)
class Metric:
    """One number that leaves the program, in the unit of its Kind (bytes, never MiB).

    value: None where it could not be obtained; then `absent` says why. Never -1, 0 or nan for "unknown".
    n, min, max, samples: over the measured steps.  phases: the peak of each phase of a step.

    Raises ValueError: when it has both a value and a reason of absence, or neither; or an unknown source.
    """

    value: Value
    source: Source
    absent: str | None = None
    n: int | None = None
    min: float | None = None
    max: float | None = None
    samples: list[float] | None = None
    phases: dict[str, int] | None = None

    def __post_init__(self) -> None:
        check_origin(self.value, self.absent, self.source)

    def to_json(self, name: str) -> dict[str, Any]:
        """The metric with its unit; fields that are None are left out, except `value`.

        Infinity and NaN, also within lists, become the strings "Infinity", "-Infinity", "NaN": JSON has no such number.
        Raises UserError: when `name` is not in METRICS.
        """
        if name not in METRICS:
            raise UserError(name, "is no metric", "enter it, with its unit, into METRICS of catalogue/metrics.py")
        fields = {key: written(value) for key, value in vars(self).items() if value is not None}
        return {"value": None, "unit": METRICS[name].unit, **fields}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Metric:
        """The metric that `to_json` wrote. Raises TypeError or ValueError: when the content is not a metric."""
        known = {key: value for key, value in content.items() if key in _FIELDS_OF_METRIC}
        for key, value in known.items():
            # A reason stays text, even if it is the word "NaN".
            if isinstance(value, (str, list)) and key not in ("source", "absent"):
                known[key] = _read(value)
        return Metric(**known)


_WORDY = frozenset((str, list))
_FIELDS_OF_METRIC = frozenset(Metric.__dataclass_fields__)


class StoredMetrics(Mapping[str, Metric]):
    """The metrics of a record that was read: each is made from its JSON when it is first asked for.

    A run has hundreds of thousands of metrics, of which a command looks at few. That each of them is a metric is
    checked here, so that a damaged record is found when it is read.

    content: JSON of each metric by name.  Raises KeyError or ValueError: when one is not a metric.
    """

    __slots__ = ("_made", "content")

    def __init__(self, content: dict[str, dict[str, Any]]) -> None:
        check_metrics(content)
        self.content = content
        self._made: dict[str, Metric] = {}

    def __getitem__(self, name: str) -> Metric:
        metric = self._made.get(name)
        if metric is None:
            metric = self._made[name] = Metric.from_json(self.content[name])
        return metric

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.content else default

    def plain(self, name: str) -> tuple[int | float | None, str, float | None, float | None] | None:
        """Value, source, min and max of a metric without making it, which takes several times as long.

        The value is None where it is absent. None where there is no such metric, or one of the four is a word or a
        list: then ask for the metric.
        """
        content = self.content.get(name)
        if content is None:
            return None
        value, low, high = content["value"], None, None
        if len(content) > 3:
            low, high = content.get("min"), content.get("max")
        if type(value) in _WORDY or type(low) is str or type(high) is str:
            return None
        return value, content["source"], low, high

    def keys(self) -> KeysView[str]:
        return self.content.keys()

    def __contains__(self, name: object) -> bool:
        return name in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True)
class Record:
    """One executed repeat of a cell. Field names are those of docs/measuring.md 2.

    cell: `Cell.recorded()`, and what was observed in the run (`attention_used`, `model_revision`).
    status_detail: type, message, phase, requested_bytes, free_bytes, capacity_bytes, dominated_by,
        exit_signal, traceback; only those that are known.
    wall_s: seconds from the start of the process to its end.
    """

    record_id: str
    run_id: str
    cell_id: str
    repeat: int
    protocol_id: str
    environment_id: str
    meftbench_version: str
    code_digest: str
    started_at: str
    finished_at: str
    host: str
    worker_pid: int | None
    cell: dict[str, Any]
    status: Status
    status_detail: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def label(self) -> str:
        """MODEL/METHOD/bBATCH/sLENGTH of the cell."""
        return str(self.cell["label"])

    @property
    def parts(self) -> tuple[Part, ...]:
        """The method and then each lever, with the settings that differ from the defaults.

        Records that were written before there was the field have it in the label of the cell alone.
        """
        if recorded := self.cell.get("parts"):
            return parts_from(recorded)
        whole = self.label.partition(f"/b{self.cell['batch_size']}/s")[0]
        return parts_of_older(whole[len(self.model_label) + 1 :])

    @property
    def method_label(self) -> str:
        """The method with its levers and settings, as the label of the cell has it."""
        return joined(self.parts)

    @property
    def model_label(self) -> str:
        return label_of(str(self.cell["model"]), self.cell.get("model_config") or {})

    def value(self, name: str) -> Value:
        """The value of a metric; None where it is absent or was not measured."""
        if isinstance(self.metrics, StoredMetrics) and (plain := self.metrics.plain(name)):
            return plain[0]
        metric = self.metrics.get(name)
        return metric.value if metric else None

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        # Imported by name, because records may not import reports (the import layers in pyproject.toml).
        return str(import_module("meftbench.report.render.notebook").record_html(self))

    def to_json(self) -> dict[str, Any]:
        """The record as it is stored; a metric of a later version, whose unit is not known here, as it was read."""
        content = {key: value for key, value in vars(self).items() if key != "metrics"}
        read = self.metrics.content if isinstance(self.metrics, StoredMetrics) else {}
        metrics = {
            name: written(read[name]) if name in read and name not in METRICS else self.metrics[name].to_json(name)
            for name in self.metrics
        }
        return content | {"metrics": metrics}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Record:
        """The record that `to_json` wrote. Raises KeyError, TypeError or ValueError: when the content is no record."""
        check_record(content)
        if content.keys() == _FIELDS_OF_RECORD:
            # The usual case, without the constructor, which would set every field by itself.
            record = object.__new__(Record)
            vars(record).update(content, metrics=StoredMetrics(content["metrics"]))
            return record
        known = {key: value for key, value in content.items() if key in _FIELDS_OF_RECORD}
        return Record(**(known | {"metrics": StoredMetrics(content["metrics"])}))


_FIELDS_OF_RECORD = frozenset(Record.__dataclass_fields__)


def written(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite, also within lists and mappings, become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: written(item) for key, item in value.items()}
    return [written(item) for item in value] if isinstance(value, list | tuple) else value


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    return [_read(item) for item in value] if isinstance(value, list) else value
