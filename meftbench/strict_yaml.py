"""Reads YAML safely and strictly: duplicate keys are errors, and every error names the line of its key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from meftbench.documents import WRITTEN_BYTES, guarded, text_of
from meftbench.errors import UserError, one_line, unknown
from meftbench.schema_faults import fault_and_cure

DEEPEST = 50
MOST_VALUES = 500_000  # of a file, with what its aliases repeat; a budgets file of 50,000 rows has as many
_MERGE = "tag:yaml.org,2002:merge"


# The safe loader of libyaml, ten times as fast, where PyYAML was built with it.
_SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What constructors of PyYAML raise for a value that is not of its tag, such as `!!bool x` or `!!int ''`.
_UNFIT = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)


class _Loader(_SAFE_LOADER):  # type: ignore[misc]
    """A safe loader that reads 1e-5 as a number. In YAML 1.1 it is text, since it has no decimal point."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _UNFIT as error:  # such as from the date 2026-13-45; it has no line number yet
            why = str(error) if isinstance(error, ValueError) else f"a value that is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


_SHOWN = 10**4000  # Python writes no whole number of more than 4,300 digits
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def _number(read: Callable[[Any, yaml.Node], Any]) -> Callable[[Any, yaml.Node], Any]:
    """`read` without what only YAML 1.1 takes for a number of another base: 1:30 (90, to the base 60) and 010 (8).

    Raises ValueError: it is one of these, with what YAML makes of it.
    """

    def number(loader: Any, node: yaml.Node) -> Any:
        value = read(loader, node)
        if ":" in node.value or _OCTAL.fullmatch(node.value):
            value = str(value) if abs(value) < _SHOWN else "a number of more than 4,000 digits"
            raise ValueError(f"{node.value[:40]} would be read as {value}: write that number, or put a text in quotes")
        if type(value) is int and not -_SHOWN < value < _SHOWN:  # 0xfff...; a message could not show it
            raise ValueError("a number of more than 4,000 digits")
        return value

    return number


for _kind in ("int", "float"):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_constructor(_tag, _number(_Loader.yaml_constructors[_tag]))


def parse(text: str) -> Any:
    """The value of a YAML text, read as in the files of this project.

    Raises yaml.YAMLError: it is not valid, is nested too deeply, or its aliases repeat more than is read.
    """
    return _parsed(text, _Loader)


def parse_generated(text: str) -> Any:
    """The value of a YAML text that a program wrote, with the numbers of YAML 1.1. Raises yaml.YAMLError as `parse`."""
    try:
        return _parsed(text, _SAFE_LOADER)
    except _UNFIT as error:
        raise yaml.YAMLError(f"a value is not of its tag ({error})") from None


def _parsed(text: str, loader_class: Any) -> Any:
    check_nesting(text)
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if "*" in text:
            _check_repeated(node, MOST_VALUES + len(text))
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


# Values on one line, each within the one before: `- - - 1`, `? ? ? 1`.
_WITHIN_ANOTHER = re.compile(r"(?:[-?:][ \t]+){40}")


def check_nesting(text: str) -> None:
    """Raises yaml.YAMLError: a YAML text is nested more deeply than the parser in C can read without a crash.

    Only texts that may be are read for it; those with a level on each line are bounded by the size of the file.
    """
    if text.count("[") + text.count("{") <= DEEPEST and not _WITHIN_ANOTHER.search(text):
        return
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2 * DEEPEST:
            place: Any = event.start_mark
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", place)


def _check_repeated(node: yaml.Node, most: int) -> None:
    """Raises yaml.YAMLError: a document has more than `most` values, with what aliases repeat, or refers to itself."""
    level, seen = [node], 1
    for _ in range(2 * DEEPEST):
        below: list[yaml.Node] = []
        for outer in level:
            if isinstance(outer, yaml.MappingNode):
                below += (part for pair in outer.value for part in pair)
            elif isinstance(outer, yaml.SequenceNode):
                below += outer.value
            if seen + len(below) > most:
                raise yaml.YAMLError(f"it has more than {most:,} values, with what its aliases repeat")
        seen, level = seen + len(below), below
        if not level:
            return
    raise yaml.YAMLError("it is nested too deeply, or refers to itself")


KeyPath = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


class FaultAtError(ValueError):
    """Raised by a validator of several values: what is wrong, and at which path below the validated value."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path: KeyPath = path


@dataclass(frozen=True)
class Document:
    """A parsed file: `content` as plain Python values, and the line (from 1) of each key path.

    lines: of keys, and of items of lists; what an alias or a merge key brings in has the line where it is written.
    values: the lines of those scalar values that are not on the line of their key.
    """

    file: Path
    content: Any
    lines: dict[KeyPath, int]
    values: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath = (), key: bool = False) -> str:
        """The place of `path` as `file:line: grid.method[2]`, with the line of the nearest key that is in the file.

        key: give the line of the key, not that of its value.
        """
        if not self.lines and path[1:] == ("name",):
            path = path[:1]  # the value is from a command line, where a name is written without a key
        known_path = path
        while known_path and known_path not in self.lines:
            known_path = known_path[:-1]
        dotted = "".join(f"[{key}]" if type(key) is int else f".{key}" for key in path).lstrip(".")
        line = self.lines.get(known_path, 1) if key else self.values.get(known_path, self.lines.get(known_path, 1))
        place = f"{self.file}:{line}" if self.lines else str(self.file)
        return f"{place}: {dotted}" if dotted else place

    def error(self, path: KeyPath, what: str, cure: str) -> UserError:
        """A UserError about the value at `path`."""
        return UserError(self.where(path), what, cure)


def read(file: Path, example: str = "schema: 1") -> Document:
    """Parse `file`. example: a key and value to start such a file with, for the message.

    Raises UserError: the file is not found, cannot be read, or is not UTF-8 or not YAML; a key is given twice.
    """
    text = text_of(file, WRITTEN_BYTES, "name a readable YAML file")
    with guarded(str(file), "write it flatter"):
        return _document(file, text, example)


def _document(file: Path, text: str, example: str) -> Document:
    loader = _Loader(text)
    try:
        check_nesting(text)
        node = loader.get_single_node()
        places = _Places(file, loader)
        if node is not None:
            places.locate(node, ())
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        context_line = error.context_mark.line + 1 if error.context_mark else line
        inside = f", in what begins on line {context_line}" if context_line != line else ""
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
        self.seen = 0

    def _count(self, line: int) -> None:
        """Raises UserError: the document has too many values, of which aliases may repeat a few over and over."""
        self.seen += 1
        if self.seen > MOST_VALUES:
            what = f"has more than {MOST_VALUES:,} values, with what its aliases repeat"
            raise UserError(f"{self.file}:{line}", what, "write fewer, or without aliases")

    def locate(self, node: yaml.Node, path: KeyPath) -> None:
        """Note the lines of everything in `node`, which stands at `path`. Raises UserError: a key given twice."""
        line = node.start_mark.line + 1
        self._count(line)
        if len(path) > DEEPEST:  # an alias inside the value that it refers to never ends
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
        first_lines: dict[Any, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value in node.value:
            key, line = self._key(key_node), key_node.start_mark.line + 1
            self._count(line)
            if key in first_lines:
                cure = f"it stands on line {first_lines[key]} already: remove one"
                raise UserError(f"{self.file}:{line}", f"duplicate key {key!r}", cure)
            first_lines[key] = line
            if key_node.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif (*path, key) not in self.lines:  # a key of the mapping itself takes precedence over a merged one
                self.lines[*path, key] = line
                self.locate(value, (*path, key))
        for mapping in merged:
            if isinstance(mapping, yaml.MappingNode):
                self._mapping(mapping, path)

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.tag == _MERGE:
            return str(node.value)
        return self.loader.construct_object(node)


def validated(document: Document, schema: type[M]) -> M:
    """`document` as a `schema`. Raises UserError, with the line: the first fault that was found."""
    return validated_part(document, (), document.content, schema)


def validated_part(document: Document, path: KeyPath, content: Any, schema: type[M]) -> M:
    """Like `validated`, for the value `content`, which is at `path` of the document."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        faults = error.errors()
        # Where a value may be written in several ways, the fault is reported for the way in which most of it was valid.
        top = faults[0]["loc"][:1]
        first = max((fault for fault in faults if fault["loc"][:1] == top), key=lambda fault: len(fault["loc"]))
    kind, value = first["type"], first.get("input")
    cause = first.get("ctx", {}).get("error")
    below = cause.path if isinstance(cause, FaultAtError) else ()
    absent = not below and first["loc"][-1:] != () and first["loc"][-1] in _keys_at(schema, first["loc"][:-1])
    path_below = _path_in(content, (*first["loc"], *below), absent)
    loc: KeyPath = (*path, *path_below)
    if kind == "extra_forbidden":
        raise unknown(document.where(loc, key=True), "key", loc[-1], _keys_at(schema, first["loc"][:-1]))
    if kind == "missing":
        raise document.error(loc, "is missing", "add it")
    if kind == "invalid_key":  # pydantic names a key that is not a text in its own way
        loc = (*path, *_path_in(content, first["loc"][:-1], False), value)
    if below:
        value = _value_at(content, path_below)
    raise document.error(loc, *fault_and_cure(kind, first["msg"], value))


def _path_in(content: Any, loc: KeyPath, absent: bool) -> KeyPath:
    """The path in `content` for pydantic's `loc`. absent: its last key may be one that is missing there.

    In `loc`, pydantic adds names of its own, such as that of the type it tried of several (`list[float]`), and an index
    where a single value is taken for a list of one.
    """
    path: list[str | int] = []
    for number, key in enumerate(loc):
        if isinstance(content, dict):
            content_key = next((name for name in content if str(name) == str(key)), None)
            if content_key is None and not (absent and number == len(loc) - 1):
                continue
            content = content.get(content_key)
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
    """`settings` from Python code as a `schema`. Raises UserError, with the nearest key: they are not valid."""
    return validated_part(Document(Path(where), settings, {}), (), settings, schema)


def _keys_at(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at `loc` below `schema` accepts, by alias where they have one."""
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
    """The first model in a type annotation, such as in `list[Model] | None`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if model := _model_in(part):
            return model
    return None


def named(document: Document, path: KeyPath, value: Any, kind: str) -> tuple[str, dict[str, Any]]:
    """A name and its settings, from "name" or {name: ..., key: value}. Raises UserError: it has no name."""
    settings = dict(value) if isinstance(value, dict) else {"name": value}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        hint = "YAML reads yes, no, on and off as true or false: put the word in quotes"
        plain = f"write a name of `meftbench list {kind}s`, or {{name: ..., key: value}}"
        cure = hint if isinstance(name, bool) else plain
        raise document.error(name_place(path, value), f"{name!r} is not the name of a {kind}", cure)
    return name, settings


def name_place(path: KeyPath, value: Any) -> KeyPath:
    """The path of the name in a value that `named` takes."""
    return (*path, "name") if isinstance(value, dict) and "name" in value else path
