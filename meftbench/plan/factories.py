"""Models and batches made by the user's own functions, named `module:function`: how such names are told and checked.

Whether a name means a function follows from the name alone, never from files. The user's own code is not imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.errors import UserError
from meftbench.strict_yaml import Document, KeyPath

if TYPE_CHECKING:
    from meftbench.plan.cell import Cell

# Environment variables of the processes that may import such functions: the working folder, and a JSON list of calls,
# [name, names of arguments], whose functions are checked before the first cell.
FOLDER = "MEFTBENCH_CODE_FOLDER"
CALLS = "MEFTBENCH_CODE_CALLS"
# The attention of a cell whose model is made by a function, which chooses the attention itself.
OWN_ATTENTION = "own"
# The name of a function, and the names of the arguments that it is called with.
Call = tuple[str, tuple[str, ...]]
BATCH_ARGUMENTS = ("batch_size", "sequence_length")
EXAMPLE = "my_package.models:build"


def is_factory(name: str) -> bool:
    """Whether a name means a function: dotted identifiers, one colon, an identifier.

    No name on the Hugging Face hub has a colon. A folder `a:b` is written `./a:b`.
    """
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), function])


def check_factory(where: str, name: str, kind: str, example: str = EXAMPLE) -> None:
    """Raises UserError: `name` does not have the form module:function. kind: what it makes."""
    if is_factory(name):
        return
    file, is_file, function = name.partition(".py:")
    module = file.removeprefix("./").replace("/", ".")
    cure = f"write {module}:{function}" if is_file and is_factory(f"{module}:{function}") else f"write {example}"
    raise UserError(where, f"{name!r} is not the name of a {kind}, module:function", cure)


def check_arguments(where: str, config: Mapping[str, Any]) -> None:
    """Raises UserError: a key of `config` is not an identifier, so that it cannot be a keyword argument."""
    invalid = [key for key in config if not key.isidentifier()]
    if invalid:
        raise UserError(where, f"config has a key {invalid[0]!r}", "write names as Python has them")


def check_own(document: Document, place: Mapping[str, KeyPath], model: str, values: Mapping[str, Any]) -> None:
    """Raises UserError: in the `values` of a cell, `batch` is not the name of a function or stands beside a task; or,
    in a cell without a task, a head is named although the user's own function makes the model."""
    if values.get("batch") is not None:
        check_factory(document.where(place["batch"]), values["batch"], "batch", "my_package.models:batch")
        if values.get("training") is not None:
            raise document.error(place["batch"], "is not for a task, whose rows make the batch", "leave it out")
    if is_factory(model) and values.get("head") is not None and values.get("training") is None:
        raise document.error(place["head"], f"is what {model!r} gives its model", "leave it out")


def calls_of(cells: Iterable[Cell]) -> list[Call]:
    """The calls of the user's own functions that `cells` need, each once; a cell's model comes before its batch."""
    calls: dict[Call, None] = {}
    for cell in cells:
        if is_factory(cell.model):
            calls[cell.model, tuple(cell.model_config_overrides)] = None
        if cell.batch is not None:
            calls[cell.batch, BATCH_ARGUMENTS] = None
    return list(calls)


def places_of(cell: Cell, model: str, batch: str) -> dict[Call, str]:
    """The place in the suite of each call that `cell` needs. model, batch: the places of its model and its batch."""
    return {call: batch if call == (cell.batch, BATCH_ARGUMENTS) else model for call in calls_of([cell])}


def check_allowed(places: Mapping[Call, str], cells: Iterable[Cell], allowed: bool) -> None:
    """Raises UserError: a cell needs the user's own function, and importing such code is not allowed.

    places: where each call stands in the suite or on the command line, for the message.
    """
    calls = calls_of(cells)
    if calls and not allowed:
        name = calls[0][0]
        cure = "add --allow-code, or `allow_code: true` to the suite, if you trust it"
        if Path(name).is_dir():
            cure += f"; the folder is ./{name}"
        raise UserError(
            places.get(calls[0], "model"), f"{name!r} is Python code, which is imported only when allowed", cure
        )
