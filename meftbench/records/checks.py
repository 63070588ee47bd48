"""Whether the JSON of a record has the types that a record has, so that what reads records need not ask again.

Records may be anybody's: from another version, from a disk that was full, edited by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import chain, compress
from typing import Any, Literal, NamedTuple, get_args

from meftbench.documents import LARGEST

# JSON cannot write these numbers, and a reconstruction error may be infinite, so they are written as strings.
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}

_NONE = type(None)
_WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "a mapping", list: "a list", bool: "a flag"}
_TEXT, _COUNT, _MAPPING = (str,), (int,), (dict,)
_COUNT_OR_NONE, _LIST_OR_NONE, _TEXT_OR_NONE = (int, _NONE), (list, _NONE), (str, _NONE)
Source = Literal["measured", "counted", "predicted"]
_SOURCES = frozenset(get_args(Source))
_STATUSES = ("ok", "oom", "timeout", "error", "skipped")

_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("record_id", "run_id", "cell_id", "protocol_id", "environment_id"), _TEXT),
    **dict.fromkeys(("meftbench_version", "code_digest", "started_at", "finished_at", "host", "status"), _TEXT),
    **dict.fromkeys(("repeat", "schema"), _COUNT),
    **dict.fromkeys(("cell", "status_detail", "metrics"), _MAPPING),
    "worker_pid": (int, _NONE),
    "wall_s": (int, float),
}
_NEEDED_IN_CELL = ("label", "model", "method", "batch_size", "micro_batch_size", "sequence_length")
_CELL_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("label", "model", "method", "precision", "device", "attention_requested", "optimizer"), _TEXT),
    **dict.fromkeys(("batch_size", "micro_batch_size", "sequence_length"), _COUNT),
    **dict.fromkeys(("head", "attention_used", "optimizer_impl", "model_revision", "batch", "weights"), (str, _NONE)),
    "parallelism": (str, _NONE),
    **dict.fromkeys(("data", "data_digest", "licence", "scored_by", "inputs"), (str, _NONE)),
    **dict.fromkeys(("seed", "world_size", "threads", "layers", "truncated_samples", "train_rows"), (int, _NONE)),
    **dict.fromkeys(("method_params", "lever_params", "levers", "model_config"), (dict, _NONE)),
    **dict.fromkeys(("training", "evaluation_rows"), (dict, _NONE)),
    "packing": (bool, _NONE),
    **dict.fromkeys(("cuts", "parts"), (list, _NONE)),
}
_PARAMS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("arithmetic", "coupling", "output"), (str, _NONE)),
    "side_bits": (int, _NONE),
}
_SUITE_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "run_id"), _TEXT),
    **dict.fromkeys(("suite_id", "protocol_id", "description", "source", "budgets", "command"), _TEXT_OR_NONE),
    **dict.fromkeys(("protocol", "own_code"), (dict, _NONE)),
    "cells": _LIST_OR_NONE,
}
_ENVIRONMENT_FIELDS: dict[str, tuple[type, ...]] = {
    "environment_id": _TEXT_OR_NONE,
    **dict.fromkeys(("comparable", "meftbench", "host", "gpus", "torch", "packages"), (dict, _NONE)),
}


def check_environment(content: dict[str, Any]) -> None:
    """Raises ValueError: a field of an environment is of another type."""
    _check_types(content, _ENVIRONMENT_FIELDS, "environment.")


_CELL_OF_SUITE = ("label", "cell_id")


def check_suite(content: Any) -> None:
    """Raises ValueError: `content` is not the resolved suite of a run, with its cells, where it lists them."""
    if type(content) is not dict:
        raise ValueError(f"it is {_shown(content)}, not a mapping")
    for name in ("name", "run_id"):
        if name not in content:
            raise ValueError(f"{name} is missing")
    _check_types(content, _SUITE_FIELDS, "suite.")
    for field in ("protocol", "own_code"):
        if any(type(key) is not str for key in content.get(field) or ()):
            raise ValueError(f"{field} has a key that is no text")
    for cell in content.get("cells") or ():
        if type(cell) is not dict:
            raise ValueError(f"cells has {_shown(cell)}, not a mapping")
        for name in _CELL_OF_SUITE:
            if type(cell.get(name)) is not str:
                raise ValueError(f"{name} of a cell is {_shown(cell.get(name))}, not a text")


def check_record(content: Any) -> None:
    """Raises ValueError: `content` is not a mapping with the fields of a record, each of its type."""
    if type(content) is not dict:
        raise ValueError(f"it is {_shown(content)}, not a mapping")
    _check_types(content, _FIELDS)
    cell, wall_s = content.get("cell"), content.get("wall_s", 0.0)
    if cell is None or "metrics" not in content:
        raise ValueError(f"{'metrics' if cell else 'cell'} is missing")
    if content.get("status") not in _STATUSES:
        raise ValueError(f"status is {_shown(content.get('status'))}, not one of {', '.join(_STATUSES)}")
    if not math.isfinite(wall_s):
        raise ValueError(f"wall_s is {wall_s}, not a finite number of seconds")
    for name in _NEEDED_IN_CELL:
        if name not in cell:
            raise ValueError(f"cell.{name} is missing")
    _check_types(cell, _CELL_FIELDS, "cell.")
    if min(cell["batch_size"], cell["micro_batch_size"], cell["sequence_length"]) < 1:
        raise ValueError("batch_size, micro_batch_size and sequence_length of the cell are not all 1 or more")
    _check_types(cell.get("method_params") or {}, _PARAMS, "cell.method_params.")
    if not all(type(cut) is str for cut in cell.get("cuts") or ()):
        raise ValueError(f"cell.cuts is {_shown(cell['cuts'])}, not a list of texts")
    for part in cell.get("parts") or ():
        if type(part) is not dict or type(part.get("name")) is not str or type(part.get("settings")) is not dict:
            raise ValueError(f"cell.parts has {_shown(part)}, not a method or lever with its name and settings")
    for name, amount in (content.get("status_detail") or {}).items():
        if name.endswith("_bytes") and type(amount) not in (int, _NONE):
            raise ValueError(f"status_detail.{name} is {_shown(amount)}, not a whole number")
    if cell.get("training"):
        if type(cell.get("seed")) is not int:
            raise ValueError(f"cell.seed of a training is {_shown(cell.get('seed'))}, not a whole number")
        check_training(json.dumps(cell["training"], sort_keys=True))


@lru_cache(maxsize=256)
def check_training(text: str) -> None:
    """Raises ValueError: the JSON of a cell's `training` is not one; kept, since the cells of a run share theirs."""
    from pydantic import ValidationError

    from meftbench.plan.training import Training

    try:
        Training.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("cell.training", *first["loc"])))
        raise ValueError(f"{place}: {first['msg']}") from None


def check_metrics(metrics: dict[str, dict[str, Any]]) -> None:
    """Raises KeyError or ValueError: not each of the metrics of a record, by name, is a metric."""
    contents = metrics.values()
    for name, metric in metrics.items() if set(map(type, contents)) - {dict} else ():
        if type(metric) is not dict:
            raise ValueError(f"the metric {name} is {_shown(metric)}, not a mapping")
    values = [*chain.from_iterable(map(dict.values, contents))]
    fields = tuple(chain.from_iterable(contents))
    signature = (tuple(metrics), tuple(map(len, contents)), fields, tuple(map(type, values)))
    form = _FORMS.get(signature)
    if form is not None:
        numbers = [*compress(values, form.whole_numbers)]
        if (
            _SOURCES.issuperset(compress(values, form.sources))
            and -LARGEST < min(numbers, default=0) <= max(numbers, default=0) < LARGEST
            and all(check(metrics[name][key]) for name, key, check in form.nested)
        ):
            return
    for name, metric in metrics.items():
        _check_metric(name, metric)
    if len(_FORMS) < 1000:
        _FORMS[signature] = _form_of(metrics)


class _Form(NamedTuple):
    """What is still to be checked of metrics that have the names, fields and types of some that were found right.

    whole_numbers, sources: for each field of each metric in turn, whether it is a whole number that may be too large,
        and whether it is the metric's source.  nested: metric, field and check of what may be right or wrong within one
        type, such as a list.
    """

    whole_numbers: list[bool]
    sources: list[bool]
    nested: list[tuple[str, str, _Check]]


# Most cells of a run have metrics of a form that many share: to ask field by field for each of hundreds of thousands of
# metrics takes twice as long.
_FORMS: dict[tuple[object, ...], _Form] = {}


def _form_of(metrics: dict[str, dict[str, Any]]) -> _Form:
    fields = [(name, key, part) for name, metric in metrics.items() for key, part in metric.items()]
    checks = [(name, key, _check_within(name, key, part)) for name, key, part in fields]
    return _Form(
        [key in _NUMBERS and type(part) is int for _, key, part in fields],
        [key == "source" for _, key, _ in fields],
        [(name, key, check) for name, key, check in checks if check],
    )


def _check_within(name: str, key: str, part: Any) -> _Check | None:
    """What tells if a field of a metric is right, where its type leaves that open; whole numbers and sources aside."""
    if key == "value":
        return SHAPES[name][0] if name in SHAPES and type(part) is list else None
    return _PARTS[key][0] if key in _PARTS and type(part) in ((str,) if key in _NUMBERS else (list, dict)) else None


def _check_metric(name: str, metric: dict[str, Any]) -> None:
    """Raises KeyError or ValueError: it is no metric, or a field of it is of another type."""
    value, shape = metric["value"], SHAPES.get(name)
    check_origin(value, metric.get("absent"), metric["source"])
    if value is not None and not (shape[0](value) if shape else _is_value(value)):
        raise ValueError(f"the value of {name} is {_shown(value)}, not {shape[1] if shape else 'a number or a list'}")
    for key, part in metric.items():
        if key in _PARTS and part is not None and not _PARTS[key][0](part):
            raise ValueError(f"{key} of {name} is {_shown(part)}, not {_PARTS[key][1]}")


def check_origin(value: Any, absent: Any, source: Any) -> None:
    """Raises ValueError: a metric has both a value and a reason of absence, or neither; or an unknown source."""
    if (value is None) == (absent is None):
        raise ValueError("a metric has either a value or the reason why it is absent")
    if source not in get_args(Source):
        raise ValueError(f"a metric is {', '.join(get_args(Source))}, not {source!r}")


def _check_types(content: dict[str, Any], fields: dict[str, tuple[type, ...]], place: str = "") -> None:
    kinds = (place, *content, *map(type, content.values()))
    if kinds not in _FOUND_RIGHT:
        for name in fields.keys() & content.keys():
            types = fields[name]
            if type(content[name]) not in types:
                wanted = " or ".join(_WORDS[kind] for kind in types if kind is not _NONE)
                raise ValueError(f"{place}{name} is {_shown(content[name])}, not {wanted}")
        if len(_FOUND_RIGHT) < 1000:
            _FOUND_RIGHT.add(kinds)
    for name, value in content.items():
        if type(value) is int and not -LARGEST < value < LARGEST:
            raise ValueError(f"{place}{name} is a number of more than 300 digits")


# Names and types that were found to be right, since the records of a run share theirs: to ask field by field for each
# record would make reading a large run a tenth slower.
_FOUND_RIGHT: set[tuple[object, ...]] = set()


def _shown(value: Any) -> str:
    """A value as it stands in the message: cut, since it may be anything."""
    if type(value) is int and not -LARGEST < value < LARGEST:
        return "a number of more than 300 digits"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except TypeError:  # a mapping of YAML, in which a date may be a key
        text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- metrics ---


def _is_number(value: Any) -> bool:
    """A number as JSON has it, or one of the words for what is not finite."""
    if type(value) is int:
        return -LARGEST < value < LARGEST
    return type(value) is float or (type(value) is str and value in NOT_FINITE)


def _is_value(value: Any) -> bool:
    """A value of a metric that may be of a later version: a number, flag, text or list."""
    return _is_number(value) or isinstance(value, str | list | bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_layers(value: Any) -> bool:
    """As many numbers for each layer, and at least one."""
    if not isinstance(value, list) or not all(map(_are_numbers, value)):
        return False
    return len(set(map(len, value))) <= 1 and all(value)


def _is_curve(value: Any) -> bool:
    """Rows of step, loss and score; an undefined score is null, and a step is finite."""
    return isinstance(value, list) and all(
        isinstance(row, list)
        and len(row) == 3
        and all(map(_is_number, row[:2]))
        and type(row[0]) is not str
        and math.isfinite(row[0])
        and (row[2] is None or _is_number(row[2]))
        for row in value
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < LARGEST for size in value)


_OF_BUFFER = ("op", "category", "dtype", "place")


def _are_buffers(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for row in value:
        if type(row) is not dict or type(row.get("bytes")) is not int:
            return False
        if type(row.get("count")) not in _COUNT_OR_NONE or not _are_sizes(row.get("shape") or []):
            return False
        if type(row.get("module")) not in _TEXT_OR_NONE or not all(type(row.get(name)) is str for name in _OF_BUFFER):
            return False
    return True


def _are_phases(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_NUMBERS = frozenset(("value", "n", "min", "max"))  # fields of a metric that are numbers, or words for some
_Check = Callable[[Any], bool]
SHAPES: dict[str, tuple[_Check, str]] = {
    "peak_phase": (_is_text, "a text"),
    "collapse": (_is_text, "a text"),
    "peak_buffers": (_are_buffers, "a list of buffers with their bytes"),
    "learning_curve": (_is_curve, "a list of step, loss and score"),
    "reconstruction_rel": (_are_layers, "as many numbers for each layer"),
}
_PARTS: dict[str, tuple[_Check, str]] = {
    "absent": (_is_text, "a text"),
    "unit": (_is_text, "a text"),
    **dict.fromkeys(("n", "min", "max"), (_is_number, "a number")),
    "samples": (_are_numbers, "a list of numbers"),
    "phases": (_are_phases, "bytes by phase"),
}
