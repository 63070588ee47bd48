"""YAML read safely and strictly, with the line of every key: duplicate keys are refused, errors say where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from meftbench.errors import UserError, unknown

DEEPEST = 50


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 reads 1e-5, without a point, as text; everybody who writes it means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def parse(text: str) -> Any:
    """A value as our files have it. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


KeyPath = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """A parsed file: `content` as plain Python values, and the line (from 1) of each key path."""

    file: Path
    content: Any
    lines: dict[KeyPath, int]

    def where(self, path: KeyPath = ()) -> str:
        """`file:line: grid.method[2]`; the nearest key that stands in the file gives the line."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        dotted = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
        place = f"{self.file}:{self.lines.get(known, 1)}" if self.lines else str(self.file)
        return f"{place}: {dotted}" if dotted else place

    def error(self, path: KeyPath, what: str, cure: str) -> UserError:
        return UserError(self.where(path), what, cure)


def read(file: Path) -> Document:
    """Parse `file`. Raises UserError: not found, not a file, not UTF-8, not YAML, a key given twice."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(file), "no such file", "check the path") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"cannot be read ({type(error).__name__})", "name a readable YAML file") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if node is not None:
            _locate(file, node, (), lines)
        content = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UserError(str(file), "is nested too deeply", "write it flatter") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}:{line}", f"not valid YAML ({error.problem})", "mend this line") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(str(file), f"not valid YAML ({error})", "mend the file") from None
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        raise UserError(f"{file}:1", "is not a mapping of keys to values", "start with `schema: 1`")
    return Document(file, content, lines)


def _locate(file: Path, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if len(path) > DEEPEST:  # of an alias within what it stands for there is no end
        cure = f"write it without the alias, in at most {DEEPEST} levels"
        raise UserError(f"{file}:{node.start_mark.line + 1}", "is nested too deeply, or refers to itself", cure)
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                cure = f"it stands on line {seen[key]} already: remove one"
                raise UserError(f"{file}:{line}", f"duplicate key {key!r}", cure)
            seen[key] = line
            lines[*path, key] = line
            _locate(file, value, (*path, key), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _locate(file, value, (*path, index), lines)


def validated(document: Document, schema: type[M]) -> M:
    """`document` as a `schema`; the first thing wrong is raised as a UserError with its line and cure."""
    return validated_part(document, (), document.content, schema)


def validated_part(document: Document, path: KeyPath, content: Any, schema: type[M]) -> M:
    """As `validated`, for the value `content` that stands at `path` of the document."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        # Of the ways in which a value may be written, the one that it came furthest with is the one that was meant.
        top = found[0]["loc"][:1]
        first = max((fault for fault in found if fault["loc"][:1] == top), key=lambda fault: len(fault["loc"]))
    loc: KeyPath = (*path, *first["loc"])
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        raise unknown(document.where(loc), "key", loc[-1], _keys_at(schema, first["loc"][:-1]))
    if kind == "missing":
        raise document.error(loc, "is missing", "add it")
    raise document.error(loc, _sentence(first["msg"]), _cure(kind, value))


def settings_of(where: str, schema: type[M], settings: dict[str, Any]) -> M:
    """`settings` given from Python as a `schema`. Raises UserError with the nearest key."""
    return validated_part(Document(Path(where), settings, {}), (), settings, schema)


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _cure(kind: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"YAML read the value as {value}: put it in quotes if a word was meant"
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return f"YAML read {value!r} as text: write a plain number, such as 8 or 1.0e-4"
    return f"it is {value!r}"


def _keys_at(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at `loc` below `schema` accepts (aliases where it has them)."""
    for key in loc:
        if isinstance(key, int):
            continue
        field = next((f for n, f in schema.model_fields.items() if key in (n, f.alias)), None)
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            break
        schema = inner
    return [field.alias or name for name, field in schema.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _model_in(part):
            return found
    return None


def named(document: Document, path: KeyPath, value: Any, kind: str) -> tuple[str, dict[str, Any]]:
    """A name and what is set beside it, from "name" or {name: ..., key: value}. Raises UserError."""
    settings = dict(value) if isinstance(value, dict) else {"name": value}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        hint = "YAML reads yes, no, on and off as true or false: put the word in quotes"
        plain = f"write a name of `meftbench list {kind}s`, or {{name: ..., key: value}}"
        cure = hint if isinstance(name, bool) else plain
        raise document.error(path, f"{name!r} is not the name of a {kind}", cure)
    return name, settings
