"""Refuses fields that a model's configuration does not have, before a worker process is started.

Which it has is read from the source of the installed transformers, which is parsed and not imported: that would load
torch.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from meftbench.errors import unknown
from meftbench.installed import folder_of_package
from meftbench.plan.models import known_config
from meftbench.strict_yaml import Document, KeyPath

_BASES = {"PreTrainedConfig", "PretrainedConfig"}  # of transformers 5, and before


@dataclass(frozen=True)
class _Fields:
    """fields: that the configuration class declares.  attributes: all names that its module and the base class give a
    meaning to, such as properties and names that stand for a field (`attribute_map`)."""

    fields: frozenset[str]
    attributes: frozenset[str]


def check_fields(document: Document, path: KeyPath, model: str, overrides: dict[str, Any]) -> None:
    """Check the names in `overrides`, at `path` of the document, by which fields of the model's configuration are set.

    Raises UserError: at the first that it has not, with the nearest. Where the model is not on this machine, or its
    class not in transformers, nothing is known; then the cell that builds the model refuses them.
    """
    if not overrides:
        return
    published = known_config(model, {}) or {}
    known = _fields_of(str(published.get("model_type")))
    for key in overrides:
        if known and key not in known.attributes and key not in published:
            where = document.where((*path, key), key=True)
            raise unknown(where, f"field of {published['model_type']}'s configuration", key, known.fields)


@cache
def _fields_of(model_type: str) -> _Fields | None:
    """The fields of the configuration of a `model_type`; None: they are not known."""
    package = folder_of_package("transformers")
    if package is None or not re.fullmatch("[a-z0-9_-]+", model_type):
        return None
    # That of a language model beside one of images and text, gemma3_text, is in the module of both.
    for name in (model_type.replace("-", "_"), model_type.replace("-", "_").removesuffix("_text")):
        module = _classes_in(package / "models" / name / f"configuration_{name}.py")
        if own := [one for one in module if _model_type(one) == model_type]:
            break
    else:
        return None
    base = [one for one in _classes_in(package / "configuration_utils.py") if one.name in _BASES]
    if not base or not {ast.unparse(parent) for parent in own[0].bases} <= _BASES:
        return None  # what it inherits from elsewhere is not looked for
    declared = {name for one in (*own, *base) for name in _declared(one) if not name.startswith("_")}
    return _Fields(frozenset(declared), frozenset(name for one in (*module, *base) for name in _named(one)))


@cache
def _classes_in(file: Path) -> list[ast.ClassDef]:
    """The classes of a module; none where there is no such file, or it is no Python of this version."""
    try:
        return [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    except (OSError, ValueError, SyntaxError):
        return []


def _model_type(one: ast.ClassDef) -> str:
    for node in one.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model_type":
            return str(ast.literal_eval(node.value))
    return ""


def _declared(one: ast.ClassDef) -> set[str]:
    """Fields of a dataclass, as in transformers 5, and arguments of a constructor, as before."""
    names = {
        ast.unparse(node.target)
        for node in one.body
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar")
    }
    for node in one.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names |= {argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)}
    return names


def _named(one: ast.ClassDef) -> set[str]:
    """Every name that the class gives a value, takes as an argument, or maps to another."""
    names = set()
    for node in ast.walk(one):
        match node:
            case ast.FunctionDef(name=name) | ast.arg(arg=name) | ast.Name(id=name) | ast.Attribute(attr=name):
                names.add(name)
            case ast.Constant(value=str(name)):
                names.add(name)
    return names
