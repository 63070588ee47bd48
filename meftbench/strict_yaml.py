"""YAML read safely and strictly, with the line of every key: duplicate keys are refused, errors say where."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from meftbench.errors import UserError, one_line, unknown

DEEPEST = 50
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 reads 1e-5, without a point, as text; everybody who writes it means the number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of a date such as 2026-13-45: without its line
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def parse(text: str) -> Any:
    """A value as our files have it. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


KeyPath = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


class FaultAtError(ValueError):
    """Of a validator that looks at several values: what is wrong, and the path below the validated value where."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path: KeyPath = path


@dataclass(frozen=True)
class Document:
    """A parsed file: `content` as plain Python values, and the line (from 1) of each key path.

    lines: of a key, or of an item of a list. What an alias or a merge key brings in has the line where it is written.
    values: the line of a plain value that does not stand on the line of its key.
    """

    file: Path
    content: Any
    lines: dict[KeyPath, int]
    values: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath = (), key: bool = False) -> str:
        """`file:line: grid.method[2]`; the nearest key that stands in the file gives the line.

        key: the key itself is meant, not its value.
        """
        if not self.lines and path[1:] == ("name",):
            path = path[:1]  # of a command line, on which a name is written without a key
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        dotted = "".join(f"[{key}]" if type(key) is int else f".{key}" for key in path).lstrip(".")
        line = self.lines.get(known, 1) if key else self.values.get(known, self.lines.get(known, 1))
        place = f"{self.file}:{line}" if self.lines else str(self.file)
        return f"{place}: {dotted}" if dotted else place

    def error(self, path: KeyPath, what: str, cure: str) -> UserError:
        return UserError(self.where(path), what, cure)


def read(file: Path, example: str = "schema: 1") -> Document:
    """Parse `file`. example: a key and its value that such a file has.

    Raises UserError: not found, not a file, not UTF-8, not YAML, a key given twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(file), "no such file", "check the path") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"cannot be read ({type(error).__name__})", "name a readable YAML file") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        places = _Places(file, loader)
        if node is not None:
            places.locate(node, ())
        content = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UserError(str(file), "is nested too deeply", "write it flatter") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        begin = error.context_mark.line + 1 if error.context_mark else line
        inside = f", in what begins on line {begin}" if begin != line else ""
        raise UserError(f"{file}:{line}", f"not valid YAML ({error.problem}{inside})", "mend this line") from None
    except yaml.YAMLError as error:
        unprintable = yaml.reader.Reader.NON_PRINTABLE.search(text)
        if unprintable is None:
            raise UserError(str(file), f"not valid YAML ({one_line(error)})", "mend the file") from None
        line = text.count("\n", 0, unprintable.start()) + 1
        what = f"not valid YAML (the control character {unprintable[0]!r})"
        raise UserError(f"{file}:{line}", what, "remove it from this line") from None
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        raise UserError(f"{file}:1", "is not a mapping of keys to values", f"start with `{example}`")
    return Document(file, content, places.lines, places.values)


class _Places:
    """Finds the lines of a document's keys and values."""

    def __init__(self, file: Path, loader: _Loader) -> None:
        self.file, self.loader = file, loader
        self.lines: dict[KeyPath, int] = {}
        self.values: dict[KeyPath, int] = {}

    def locate(self, node: yaml.Node, path: KeyPath) -> None:
        """Note the lines of everything in `node`, which stands at `path`. Raises UserError: a key given twice."""
        line = node.start_mark.line + 1
        if len(path) > DEEPEST:  # of an alias within what it stands for there is no end
            cure = f"write it without the alias, in at most {DEEPEST} levels"
            raise UserError(f"{self.file}:{line}", "is nested too deeply, or refers to itself", cure)
        self.lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.locate(value, (*path, index))
        elif line != self.lines[path]:
            self.values[path] = line

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[Any, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value in node.value:
            key, line = self._key(key_node), key_node.start_mark.line + 1
            if key in first:
                cure = f"it stands on line {first[key]} already: remove one"
                raise UserError(f"{self.file}:{line}", f"duplicate key {key!r}", cure)
            first[key] = line
            if key_node.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif (*path, key) not in self.lines:  # what is written stands before what is merged in
                self.lines[*path, key] = line
                self.locate(value, (*path, key))
        for other in merged:
            if isinstance(other, yaml.MappingNode):
                self._mapping(other, path)

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.tag == _MERGE:
            return str(node.value)
        return self.loader.construct_object(node)


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
    kind, value = first["type"], first.get("input")
    said = first.get("ctx", {}).get("error")
    below = said.path if isinstance(said, FaultAtError) else ()
    absent = not below and first["loc"][-1:] != () and first["loc"][-1] in _keys_at(schema, first["loc"][:-1])
    written = _written(content, (*first["loc"], *below), absent)
    loc: KeyPath = (*path, *written)
    if kind == "extra_forbidden":
        raise unknown(document.where(loc, key=True), "key", loc[-1], _keys_at(schema, first["loc"][:-1]))
    if kind == "missing":
        raise document.error(loc, "is missing", "add it")
    if kind == "invalid_key":  # pydantic has its own spelling of a key that is no text
        loc = (*path, *_written(content, first["loc"][:-1], False), value)
    if below:
        value = _value_at(content, written)
    raise document.error(loc, _sentence(first["msg"]), _cure(kind, value))


def _written(content: Any, loc: KeyPath, absent: bool) -> KeyPath:
    """The part of pydantic's `loc` that stands in `content`; absent: its last key may be one that is left out there.

    pydantic adds names of its own, such as the type that it tried of several (`list[float]`), and an index where one
    value is taken for a list of one.
    """
    path: list[str | int] = []
    for number, key in enumerate(loc):
        if isinstance(content, dict):
            found = next((name for name in content if str(name) == str(key)), None)
            if found is None and not (absent and number == len(loc) - 1):
                continue
            content = content.get(found)
            path.append(key)
        elif isinstance(content, list | tuple) and isinstance(key, int) and key < len(content):
            content = content[key]
            path.append(key)
    return tuple(path)


def _value_at(content: Any, path: KeyPath) -> Any:
    for key in path:
        content = content[key]
    return content


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
        raise document.error(name_place(path, value), f"{name!r} is not the name of a {kind}", cure)
    return name, settings


def name_place(path: KeyPath, value: Any) -> KeyPath:
    """Where the name stands of what `named` takes."""
    return (*path, "name") if isinstance(value, dict) and "name" in value else path
