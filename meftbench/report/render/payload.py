"""The data that a page holds for its charts, tables and details: columns of all cells, compressed, and read by js/.

Cells stand in the order of their tables. Words are numbered by column, since most repeat; numbers are in the unit of
their metric, `null` where they were not taken, and those that are not finite are the words of the records.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import METRICS
from meftbench.escapes import visible
from meftbench.records.outcome import Outcome, outcomes
from meftbench.records.record import Record, written
from meftbench.records.store import Run
from meftbench.report.columns import heading_of, in_groups
from meftbench.report.figures.style import CATEGORY, COLOUR
from meftbench.report.results import SETTING, run_names, setting_text, shape_text
from meftbench.report.views.detail import command, headline, sections, warnings
from meftbench.report.views.scores import results, trained, untrained
from meftbench.report.views.steps import SHARE, StepRow, StepTable, setting_name, step_table
from meftbench.verdicts.environment import environments, facts

if TYPE_CHECKING:
    from pandas import DataFrame

CHUNK = 50  # cells whose details are compressed together: so few that a row opens at once
_SHAPE = ("batch_size", "micro_batch_size", "sequence_length")
_MAPPED = ("peak_allocated_bytes", "activation_peak_bytes", "peak_reserved_bytes", "step_time_s", "tokens_per_s")
_MOST_CHOICES = 40  # of a filter; a column with more words is searched instead


@dataclass(frozen=True)
class Payload:
    """data: base64 of the compressed columns.  details: of the details, a text for each CHUNK cells.  tables: by name,
    as the page shows them where no script runs."""

    data: str
    details: tuple[str, ...]
    tables: tuple[tuple[str, StepTable], ...]
    has_map: bool


def packed(content: Any) -> str:
    """JSON, compressed, as base64; the same bytes for the same content."""
    encode = partial(json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        text = encode(content)
    except ValueError:  # some number is not finite, as of a training that broke down
        text = encode(written(content))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def payload(runs: Sequence[Run], frame: DataFrame) -> Payload:
    """The data of a page. frame: of the runs, of `results.frame_of`."""
    steps, trainings = untrained(frame), trained(frame)
    tables = [("steps", step_table(steps, "page")), ("trainings", step_table(trainings, "training"))]
    tables = [(name, table) for name, table in tables if table.rows]
    rows = [row for _, table in tables for row in table.rows]
    titles = _titles(rows)
    shapes = _shapes(rows, titles)
    numbers = _numbers(rows, frame)
    begin, described = 0, []
    for name, table in tables:
        described.append(_described(name, table, begin, len(runs) > 1))
        begin += len(table.rows)
    content = {
        "count": len(rows),
        "chunk": CHUNK,
        "tables": described,
        "words": _words(tables, rows, titles, shapes)
        | {"result": _numbered(_results(rows, trainings)), "line": _numbered(_lines(rows, len(runs) > 1))},
        "numbers": numbers,
        "sources": {
            name: _numbered(
                ["" if row.cell.get(name) is None else row.cell.get(f"{name}_source") or "" for row in rows]
            )
            for name in numbers
            if name in METRICS
        },
        "metrics": {
            name: {"unit": kind.unit, "better": kind.better, "meaning": kind.meaning} for name, kind in METRICS.items()
        },
        "headings": {name: heading_of(name) for name in numbers},
        "colours": {name: COLOUR[name] for row in rows if (name := row.cell["method_name"]) in COLOUR},
        "categories": CATEGORY,
        "environments": {name: facts(each) for run in runs for name, each in environments(run).items()},
        "groups": len(set(titles)),
        "shapes": list(dict.fromkeys(shapes)),
        "largest": _largest(rows, shapes),
        "presets": _presets(rows, shapes, numbers),
        "axes": in_groups(name for name in numbers if name != "micro_batch_size"),
        "mapped": [name for name in _MAPPED if name in numbers],
    }
    return Payload(packed(content), _details(runs, rows), tuple(tables), _has_map(rows))


def anchor(run: str, cell_id: str) -> str:
    """The id of a cell's row in the page, of the names as records or as tables have them. Characters that an id may not
    have are their numbers, so that two runs whose names differ in these alone have different ids."""
    return f"cell-{_in_id(run)}-{_in_id(cell_id)}"


def _in_id(name: str) -> str:
    return "".join(
        char if char.isascii() and (char.isalnum() or char == "-") else f"_{ord(char):x}_" for char in visible(name)
    )


def _titles(rows: Sequence[StepRow]) -> list[str]:
    """Of each cell, what it shares with those that it may be ranked with, whichever run they are of: model and the
    settings that differ; of a training, the task."""
    steps = [row.cell for row in rows if not row.cell["task"]]
    names = [name for name in SETTING if name not in ("run", "model") and len({str(cell[name]) for cell in steps}) > 1]
    return [
        str(row.cell["task"] or ", ".join([row.cell["model"], *(setting_text(name, row.cell[name]) for name in names)]))
        for row in rows
    ]


def _shapes(rows: Sequence[StepRow], titles: Sequence[str]) -> list[str]:
    """Of each cell, at what it may be ranked: its shape, and the title where there are several."""
    several = len(set(titles)) > 1
    return [
        shape_text(*(row.cell[name] for name in _SHAPE)) + (f", {title}" if several else "")
        for row, title in zip(rows, titles, strict=True)
    ]


def _results(rows: Sequence[StepRow], frame: DataFrame) -> list[str]:
    """Of each training, the result that it is part of: those of one method and task that differ in the seed alone, at
    the learning rate that validation chose; "" for other cells."""
    numbers: dict[tuple[str, str], str] = {}
    for number, result in enumerate(results(frame)):
        numbers |= {(row["run"], row["cell_id"]): str(number) for row in result.rows}
    return [numbers.get((row.cell["run"], row.cell["cell_id"]), "") for row in rows]


def _largest(rows: Sequence[StepRow], shapes: Sequence[str]) -> str:
    """The shape at which most cells ended ok, of several the largest."""
    ended: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for row, shape in zip(rows, shapes, strict=True):
        ended[shape] = ended.get(shape, 0) + (row.cell["status"] == "ok")
        tokens[shape] = row.cell["batch_size"] * row.cell["sequence_length"]
    return max(ended, key=lambda shape: (ended[shape], tokens[shape]), default="")


def _lines(rows: Sequence[StepRow], several_runs: bool) -> list[str]:
    """Of each cell, the name of what it is drawn as: the method, and of several runs the run."""
    return [f"{row.cell['method']} · {row.cell['run']}" if several_runs else row.cell["method"] for row in rows]


def _numbers(rows: Sequence[StepRow], frame: DataFrame) -> dict[str, list[Any]]:
    """Shapes, learning rates and every metric that is a number in some cell, in the order of the rows."""
    place = {key: index for index, key in enumerate(zip(frame["run"], frame["cell_id"], strict=True))}
    order = [place[row.cell["run"], row.cell["cell_id"]] for row in rows]
    columns = {}
    for name in (*_SHAPE, "learning_rate", *METRICS):
        if name not in frame:
            continue
        values = frame[name].to_numpy(dtype=object)
        column = [_number(values[at]) for at in order]
        if any(value is not None for value in column):
            columns[name] = column
    columns[SHARE] = [_number(row.numbers[SHARE].value) for row in rows]
    return columns


def _number(value: Any) -> Any:
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else written(value)


def _numbered(words: Iterable[str]) -> dict[str, Any]:
    places: dict[str, int] = {}
    at = [places.setdefault(word, len(places)) for word in words]
    return {"values": list(places), "at": at}


def _words(
    tables: Sequence[tuple[str, StepTable]],
    rows: Sequence[StepRow],
    titles: Sequence[str],
    shapes: Sequence[str],
) -> dict[str, dict[str, Any]]:
    words: dict[str, list[str]] = {
        name: [str(row.cell[name]) for row in rows]
        for name in ("run", "cell_id", "label", "model", "method", "method_name", "status", "detail")
    }
    words |= {
        "anchor": [anchor(row.cell["run"], row.cell["cell_id"]) for row in rows],
        "name": [row.name for row in rows],
        "task": [str(row.cell["task"] or "") for row in rows],
        "parameters": [", ".join(row.parameters) for row in rows],
        "text batch_size": [row.batch for row in rows],
        "text sequence_length": [str(row.cell["sequence_length"]) for row in rows],
        "shape": list(shapes),
        "group": list(titles),
        "wrong": [row.wrong for row in rows],
    }
    # A setting may have the name of another word, as that of a batch of one's own has.
    for name in dict.fromkeys(name for _, table in tables for name in table.differing):
        words[f"setting {name}"] = [row.settings.get(name, "") for row in rows]
    for metric in dict.fromkeys(metric for row in rows for metric in row.numbers):
        words[f"text {metric}"] = [row.numbers[metric].text if metric in row.numbers else "-" for row in rows]
    return {name: _numbered(column) for name, column in words.items()}


def _described(name: str, table: StepTable, begin: int, several_runs: bool) -> dict[str, Any]:
    """A table for js/table.js: its columns, the words that it can be filtered by, and the cells that are its rows."""

    def words(key: str, heading: str) -> dict[str, Any]:
        return {"key": key, "heading": heading, "unit": "", "meaning": "", "numeric": False}

    def number(metric: str, heading: str, unit: str, meaning: str, key: str) -> dict[str, Any]:
        return {"key": key, "sort": metric, "heading": heading, "unit": unit, "meaning": meaning, "numeric": True}

    leading = ["run"] * several_runs + ["model"] * table.several_models
    columns = [
        words("name", "method"),
        number("batch_size", "batch", "samples", "samples of a step", "text batch_size"),
        number("sequence_length", "tokens", "", "tokens of a sample", "text sequence_length"),
        *(words(key, key) for key in leading),
        *(words(f"setting {key}", setting_name(key)) for key in table.differing),
        words("status", "status"),
    ]
    for place, column in enumerate(table.columns):
        unit = "MiB" if column.unit == "bytes" else column.unit
        columns.append(number(column.metric, column.heading, unit, column.meaning, f"text {column.metric}"))
        if place == 0 and any(row.numbers[SHARE].value is not None for row in table.rows):
            meaning = "activation memory against plain full at the same shape and setting"
            columns.append(number(SHARE, "of full", "%", meaning, f"text {SHARE}"))
    filters = [
        key
        for key in (*leading, "method_name", "shape", *(f"setting {name}" for name in table.differing), "status")
        if 1 < len({_word(row, key) for row in table.rows}) <= _MOST_CHOICES
    ]
    return {
        "name": name,
        "title": f"Table of all {name}",
        "begin": begin,
        "end": begin + len(table.rows),
        "columns": columns,
        "filters": filters,
    }


def _word(row: StepRow, key: str) -> str:
    if key == "shape":
        return str([row.cell[name] for name in _SHAPE])
    setting = key.removeprefix("setting ")
    return row.settings[setting] if setting != key else str(row.cell[key])


def _presets(rows: Sequence[StepRow], shapes: Sequence[str], numbers: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Charts to begin with, by what the cells have."""
    largest = _largest(rows, shapes)
    varied = {
        name: len({row.cell[name] for row in rows if not row.cell["task"]}) > 1
        for name in ("batch_size", "sequence_length")
    }
    wanted = [
        ("memory and speed", "peak_allocated_bytes", "tokens_per_s", largest, False),
        ("score and memory", "activation_peak_bytes", "score", largest, False),
        ("score and time", "training_time_s", "score", largest, False),
        ("memory by length", "sequence_length", "activation_peak_bytes", "", True),
        ("memory by batch", "batch_size", "activation_peak_bytes", "", True),
        ("memory and its part in activations", "peak_allocated_bytes", "activation_peak_bytes", largest, False),
    ]
    return [
        {"title": title, "x": x, "y": y, "shape": shape, "log": log}
        for title, x, y, shape, log in wanted
        if x in numbers and y in numbers and varied.get(x, True)
    ]


def _has_map(rows: Sequence[StepRow]) -> bool:
    """Whether a method was run at several batch sizes and at several lengths."""
    seen: dict[str, tuple[set[int], set[int]]] = {}
    for row in rows:
        if row.cell["task"]:
            continue
        batches, lengths = seen.setdefault(row.cell["method"], (set(), set()))
        batches.add(row.cell["batch_size"])
        lengths.add(row.cell["sequence_length"])
    return any(len(batches) > 1 and len(lengths) > 1 for batches, lengths in seen.values())


def _details(runs: Sequence[Run], rows: Sequence[StepRow]) -> tuple[str, ...]:
    found: dict[tuple[str, str], tuple[Run, Outcome]] = {}
    for name, run in zip(run_names(runs), runs, strict=True):
        # As the frame, and so each row, has the names.
        found |= {(visible(name), visible(outcome.cell_id)): (run, outcome) for outcome in outcomes(run)}
    described = []
    for row in rows:
        run, outcome = found[row.cell["run"], row.cell["cell_id"]]
        described.append([_detail(run, record) for record in outcome.records])
    return tuple(packed(described[begin : begin + CHUNK]) for begin in range(0, len(described), CHUNK))


def _detail(run: Run, record: Record) -> dict[str, Any]:
    """What `meftbench show` prints of a record. A meaning that is the metric's is left out: the page has it."""
    buffers = record.value("peak_buffers")
    timeline = record.value("timeline")
    return {
        "repeat": record.repeat,
        "headline": headline(record),
        "warnings": warnings(record),
        "environment": record.environment_id,
        "command": command(run, record),
        "traceback": str(record.status_detail.get("traceback") or ""),
        "sections": [[section.title, [_line(*line) for line in section.rows]] for section in sections(record)],
        "buffers": buffers if isinstance(buffers, list) else [],
        "timeline": timeline if isinstance(timeline, list) else None,
    }


def _line(name: str, value: str, meaning: str) -> list[str]:
    return [name, value] if name in METRICS and METRICS[name].meaning == meaning else [name, value, meaning]
