"""Labels of methods with their settings and levers, such as `meft1(adapter_size=8)+checkpoint(every=2)`: written, read.

The program prints these labels, and accepts them wherever a method is asked for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from meftbench.errors import UserError


class Part(NamedTuple):
    """A method or a lever with those of its settings that differ from the defaults, by name."""

    name: str
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        return label_of(self.name, self.settings)

    def texts(self) -> list[str]:
        """The settings as a label has them, such as "every=2"."""
        return texts_of(self.settings)

    def without(self, *settings: str) -> Part:
        return Part(self.name, {key: value for key, value in self.settings.items() if key not in settings})

    def recorded(self) -> dict[str, Any]:
        """What records and rows of predictions hold (docs/reference/formats.md)."""
        return {"name": self.name, "settings": dict(self.settings)}


class Piece(NamedTuple):
    """A method or a lever in a label that was typed: its name, and its settings as texts such as "every=2"."""

    name: str
    settings: list[str]


def label_of(name: str, settings: Mapping[str, Any]) -> str:
    """`name(key=value,...)`, the keys in alphabetical order; the name alone where there are no settings."""
    return f"{name}({','.join(texts_of(settings))})" if settings else name


def texts_of(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(settings.items())]


def joined(parts: Iterable[Part]) -> str:
    """The label of a method and its levers, in this order."""
    return "+".join([part.label for part in parts])


def parts_from(recorded: Iterable[Mapping[str, Any]]) -> tuple[Part, ...]:
    """The method and then each lever, from what `Part.recorded` wrote."""
    return tuple([Part(part["name"], part["settings"]) for part in recorded])


@lru_cache(maxsize=1024)
def parts_of_older(label: str) -> tuple[Part, ...]:
    """The parts of a label in a record that was written before records had them; the same label is written from them.

    A value is what `read_label` reads where that is written the same, else the text of it. Kept, since the records of a
    run have few methods.
    """
    return tuple(_older_part(piece) for piece in split_label(label))


def _older_part(piece: Piece) -> Part:
    pairs = [text.partition("=") for text in piece.settings]
    read = {key: value if f"{(value := _value(text))}" == text else text for key, _, text in pairs}
    label = f"{piece.name}({','.join(piece.settings)})" if piece.settings else piece.name
    # What is no setting, or stands twice or out of order, no version has written: then it stays in the name.
    return part if (part := Part(piece.name, read)).label == label else Part(label, {})


def split_label(label: str) -> list[Piece]:
    """The method and then each lever of a label. What is not closed, or follows a bracket, stays in the name."""
    return [_piece(text) for text in _split(label, "+")]


def split_list(text: str) -> list[str]:
    """The labels of a list that is separated by commas; those within brackets belong to the labels."""
    return [label.strip() for label in _split(text, ",")]


def read_label(where: str, label: str) -> list[tuple[str, dict[str, Any]]]:
    """The method and then each lever of a label that was typed, with the values of its settings.

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


def _piece(text: str) -> Piece:
    match = re.fullmatch(r"([^(]*)\((.*)\)", text, re.DOTALL)
    if not match:
        return Piece(text, [])
    # Only a comma before a name ends a setting: a value may be a list with commas.
    return Piece(match[1], re.split(r",(?=\s*\w+=)", match[2]) if match[2] else [])


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
