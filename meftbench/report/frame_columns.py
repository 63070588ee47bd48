"""The columns of a frame of results, from the records of its cells.

They are made column by column: a mapping for each row would take half as long again for a run of thousands of cells.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meftbench.catalogue.labels import Part, joined
from meftbench.catalogue.metrics import NOT_A_NUMBER
from meftbench.escapes import single_line, visible
from meftbench.plan.axes import FIELDS, OF_TRAINING, SETTINGS, SHAPE, WORDS
from meftbench.plan.training import Training
from meftbench.records.outcome import Outcome, names_of
from meftbench.records.record import Record, StoredMetrics

Column = list[Any]


def with_used(fields: Sequence[str]) -> list[str]:
    """`fields` of a cell, the attention that was run after the one that was asked for."""
    asked = FIELDS["attention"]
    return [column for name in fields for column in ((name, "attention_used") if name == asked else (name,))]


_OF_TRAINING = tuple(FIELDS[name] for name in OF_TRAINING)
_CELL = (
    *("model_revision", "weights"),
    *with_used([name for name in SETTINGS if name not in ("model", *_OF_TRAINING)]),
    *SHAPE,
)
# Of fields of a cell that a record lacks, since it was written before there were any: flags are off, there was one
# process, anything else is not known.
_DEFAULTS = {name: False if name in WORDS else None for name in _CELL} | {"world_size": 1}
# Settings of a reversible method that tables and plots sweep; None where a method has no such setting.
_REVERSIBLE = ("arithmetic", "side_bits", "coupling", "output")
_OF_TRAINED = (*_OF_TRAINING, "training", "scored_by", "cuts", "settings", "layers")


def cell_columns(run_names: Iterable[str], outcomes: Sequence[Outcome]) -> dict[str, Column]:
    """What is known of each cell beside its metrics, by column. run_names: that of each cell's run."""
    worst, last = [outcome.worst for outcome in outcomes], [outcome.records[-1] for outcome in outcomes]
    cells = [record.cell for record in last]
    params, parts = [cell.get("method_params") or {} for cell in cells], [record.parts for record in last]
    columns: dict[str, Column] = {
        "run": list(run_names),
        "cell_id": [outcome.cell_id for outcome in outcomes],
        "label": [outcome.records[0].label for outcome in outcomes],
        "model": [record.model_label for record in last],
        "method": [joined(of_cell) for of_cell in parts],
        "method_name": [cell.get("method") for cell in cells],
    }
    columns["parts"] = [*map(_shown_parts, parts, columns["method"])]
    columns |= {name: [cell.get(name, default) for cell in cells] for name, default in _DEFAULTS.items()}
    columns |= {name: [settings.get(name) for settings in params] for name in _REVERSIBLE}
    # Of rivals that keep side bits the number is a setting like others: they are no sweep over MEFT's couplings.
    columns["side_bits"] = [
        side_bits(settings) if str(name).startswith("meft") else None
        for name, settings in zip(columns["method_name"], params, strict=True)
    ]
    trained = [_training(record) for record in last]
    columns |= {name: [fields.get(name) for fields in trained] for name in _OF_TRAINED}
    columns |= {
        "levers": [joined(of_cell[1:]) if len(of_cell) > 1 else "" for of_cell in columns["parts"]],
        "status": [record.status for record in worst],
        "detail": [detail_of(record) for record in worst],
        "repeats": [len(outcome.records) for outcome in outcomes],
        "wall_s": [sum(record.wall_s for record in outcome.records) for outcome in outcomes],
    }
    return columns


def shown(column: Column) -> Column:
    """A column of which the texts are safe to show: records may be anybody's, terminals and pages act on some texts."""
    texts = {value for value in column if type(value) is str}
    if all(map(str.isprintable, texts)):
        return column
    return [visible(value) if type(value) is str else value for value in column]


def _shown_parts(parts: tuple[Part, ...], label: str) -> tuple[Part, ...]:
    """The parts of a `label`, their texts safe to show, so that labels written from them are."""
    if label.isprintable():
        return parts
    return tuple(
        Part(visible(part.name), {visible(key): visible(str(value)) for key, value in part.settings.items()})
        for part in parts
    )


def metric_columns(outcomes: Sequence[Outcome], metrics: Iterable[str]) -> dict[str, Column]:
    """NAME_source and NAME of each of `metrics` that any cell has; NAME_low and NAME_high where that is a number.

    Repeats are taken together as in `Outcome.figure`.
    """
    wanted = dict.fromkeys(metrics)
    figures: dict[str, list[_Figure | None]] = defaultdict(lambda: [None] * len(outcomes))
    # Cell by cell, since the records of a large run are far larger than the caches of a processor.
    for index, outcome in enumerate(outcomes):
        stored = _stored(outcome)
        for name in wanted.keys() & names_of(outcome):
            of_cell = stored.plain(name) if stored is not None and name not in NOT_A_NUMBER else None
            figures[name][index] = of_cell or _figure(outcome, name)
    columns: dict[str, Column] = {}
    for name in wanted:
        if any(figures.get(name, ())):
            of_cells = [figure or _NO_FIGURE for figure in figures[name]]
            values, sources, lows, highs = map(list, zip(*of_cells, strict=True))
            columns |= {f"{name}_source": sources, name: values}
            if name not in NOT_A_NUMBER and any(value is not None for value in values):
                columns |= {f"{name}_low": lows, f"{name}_high": highs}
    return columns


_Figure = tuple[Any, str, float | None, float | None]  # value, source, low and high; the value is None where absent
_NO_FIGURE = (None, None, None, None)


def _stored(outcome: Outcome) -> StoredMetrics | None:
    """The metrics of the usual cell, of which nothing is combined over repeats: one record, as read, that ended ok."""
    record = outcome.records[0]
    usual = len(outcome.records) == 1 and record.status == "ok" and isinstance(record.metrics, StoredMetrics)
    return record.metrics if usual else None  # type: ignore[return-value]


def _figure(outcome: Outcome, name: str) -> _Figure | None:
    """A metric over the repeats of a cell; None: no repeat that counts has it."""
    metric = outcome.metric(name)
    if metric is None:
        return None
    if name in NOT_A_NUMBER:
        return metric.value if outcome.status == "ok" else None, metric.source, None, None
    figure = outcome.figure(name)
    return (figure.value, metric.source, figure.low, figure.high) if figure else (None, metric.source, None, None)


def _training(record: Record) -> dict[str, Any]:
    """The columns of a cell that was trained on a task, among them the settings that differ from the defaults."""
    fields = record.cell.get("training")
    if not fields:
        return {}
    training = Training.model_validate_json(json.dumps(fields))
    return {
        "task": training.task,
        "learning_rate": training.learning_rate,
        "training": ", ".join(training.own),
        "scored_by": record.cell.get("scored_by") or "score",
        "cuts": record.cell.get("cuts") or [],
        "settings": json.dumps(record.cell.get("method_params") or {}, sort_keys=True),
        "layers": record.cell.get("layers"),
    }


def side_bits(params: Mapping[str, Any]) -> int | None:
    """Side bits of an exact method, from its recorded settings; None: it is not exact, or its factors are set.

    Where a record leaves them out they are 3, the default at that time. From a factor that is set (`lambda`, `beta`)
    they follow only together with the method.
    """
    if params.get("arithmetic") != "exact" or params.get("lambda") is not None or params.get("beta") is not None:
        return None
    return int(params.get("side_bits") or 3)


def detail_of(record: Record) -> str:
    """Why a cell did not end ok, as one line; "" where it did."""
    detail = record.status_detail
    return single_line(str(detail.get("message") or detail.get("type") or ""))
