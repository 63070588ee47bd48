"""Labels of methods with their settings and levers, such as `meft1(adapter_size=8)+checkpoint(every=2)`: written, read.

The program prints these labels, and accepts them wherever a method is asked for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from meftbench.errors import UserError


class Part(NamedTuple):
    """A method or a lever in a label: its name, and its settings as texts such as "every=2"."""

    name: str
    settings: list[str]


def label_of(name: str, settings: Mapping[str, Any]) -> str:
    """`name(key=value,...)`, the keys in alphabetical order; the name alone where there are no settings."""
    return name + (f"({','.join(f'{key}={value}' for key, value in sorted(settings.items()))})" if settings else "")


def split_label(label: str) -> list[Part]:
    """The method and then each lever of a label. What is not closed, or follows a bracket, stays in the name."""
    return [_part(text) for text in _split(label, "+")]


def split_list(text: str) -> list[str]:
    """The labels of a list that is separated by commas; those within brackets belong to the labels."""
    return [label.strip() for label in _split(text, ",")]


def read_label(where: str, label: str) -> list[tuple[str, dict[str, Any]]]:
    """The method and then each lever of a label, with the values of its settings.

    A value is a Python literal (2, 0.5, True, None, ['q_proj']); whatever is none, such as `auto`, is text.
    Raises UserError: a setting is no `key=value`, or is named twice; a bracket is not closed.
    """
    parts = []
    for name, texts in split_label(label):
        if {"(", ")"} & set(name):
            raise UserError(where, f"{label!r} has a bracket that is not closed", "write name(key=value)")
        settings: dict[str, Any] = {}
        for text in texts:
            key, equals, value = (part.strip() for part in text.partition("="))
            if not equals or not key:
                raise UserError(where, f"{text!r} in {label!r} is no setting", f"write {name}(key=value)")
            if key in settings:
                raise UserError(where, f"{key} is named twice in {label!r}", "name it once")
            settings[key] = _value(value)
        parts.append((name, settings))
    return parts


def _part(text: str) -> Part:
    match = re.fullmatch(r"([^(]*)\((.*)\)", text, re.DOTALL)
    if not match:
        return Part(text, [])
    # Only a comma before a name ends a setting: a value may be a list with commas.
    return Part(match[1], re.split(r",(?=\s*\w+=)", match[2]) if match[2] else [])


def _split(text: str, separator: str) -> list[str]:
    """The pieces of `text` between separators that are outside of brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == separator and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text, text)
