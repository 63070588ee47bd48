"""Faults that pydantic finds in what people write, in terms of YAML and not of Python."""

from __future__ import annotations

import datetime
from typing import Any

# By pydantic's name of the fault.
_EXPECTED = dict.fromkeys(("model_type", "dict_type"), "input should be a mapping of keys to values")
_EXPECTED |= dict.fromkeys(("tuple_type", "list_type"), "input should be a list")


def fault_and_cure(kind: str, message: str, value: Any) -> tuple[str, str]:
    """What is wrong, and what to do. kind, message: of pydantic.  value: the one that it refuses."""
    text = _EXPECTED.get(kind) or _sentence(message)
    said, _, cure = text.partition("; ")
    if cure and repr(value) in said:  # a fault found by code of ours, which has said what to write
        return said, cure
    return text, _cure(kind, value)


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _cure(kind: str, value: Any) -> str:
    if isinstance(value, bool) and kind in ("float_type", "int_type"):
        return f"YAML read the value as {value}: write a plain number, such as 8"
    if isinstance(value, bool):
        return f"YAML read the value as {value}: put it in quotes if a word was meant"
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return f"YAML read {value!r} as text: write a plain number, such as 8 or 1.0e-4"
    if isinstance(value, datetime.date):  # as the file has it
        return f"it is {value.isoformat()}"
    return f"it is {value!r}"
