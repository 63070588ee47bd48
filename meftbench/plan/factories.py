"""Models and batches made by a function of the user's own, `module:function`: what means one, and what is allowed.

Whether a name means a function is seen by the name alone, never by what lies on the disk. Nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.errors import UserError
from meftbench.strict_yaml import Document, KeyPath

if TYPE_CHECKING:
    from meftbench.plan.cell import Cell

# What the parent process tells those that may import such functions by their environment: the working folder, and, to
# be looked at before the first cell, a JSON list of [name, names of arguments].
FOLDER = "MEFTBENCH_CODE_FOLDER"
CALLS = "MEFTBENCH_CODE_CALLS"
# A cell's attention where the function that makes the model chooses it.
OWN_ATTENTION = "own"
# A function by its name, and the names of the arguments that it is called with.
Call = tuple[str, tuple[str, ...]]
BATCH_ARGUMENTS = ("batch_size", "sequence_length")
EXAMPLE = "my_package.models:build"


def is_factory(name: str) -> bool:
    """Whether a name means a function: dotted identifiers, one colon, an identifier.

    No name on the hub has a colon. A folder `a:b` is written `./a:b`.
    """
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), function])


def check_factory(where: str, name: str, kind: str, example: str = EXAMPLE) -> None:
    """Raises UserError where `name` has not the form of a function's."""
    if is_factory(name):
        return
    file, is_file, function = name.partition(".py:")
    module = file.removeprefix("./").replace("/", ".")
    cure = f"write {module}:{function}" if is_file and is_factory(f"{module}:{function}") else f"write {example}"
    raise UserError(where, f"{name!r} is not the name of a {kind}, module:function", cure)


def check_arguments(where: str, config: Mapping[str, Any]) -> None:
    """Raises UserError where what stands under `config` cannot be keyword arguments."""
    wrong = [key for key in config if not key.isidentifier()]
    if wrong:
        raise UserError(where, f"config has a key {wrong[0]!r}", "write names as Python has them")


def check_own(document: Document, place: Mapping[str, KeyPath], model: str, values: Mapping[str, Any]) -> None:
    """Raises UserError where the `values` of a cell have a batch that is none or is not for it, or say what is for the
    function to say that makes the model."""
    if values.get("batch") is not None:
        check_factory(document.where(place["batch"]), values["batch"], "batch", "my_package.models:batch")
        if values.get("training") is not None:
            raise document.error(place["batch"], "is not for a task, whose rows make the batch", "leave it out")
    if is_factory(model) and values.get("head") is not None and values.get("training") is None:
        raise document.error(place["head"], f"is what {model!r} gives its model", "leave it out")


def calls_of(cells: Iterable[Cell]) -> list[Call]:
    """How functions are called to make `cells`: of each cell the model before the batch."""
    found: dict[Call, None] = {}
    for cell in cells:
        if is_factory(cell.model):
            found[cell.model, tuple(cell.model_config_overrides)] = None
        if cell.batch is not None:
            found[cell.batch, BATCH_ARGUMENTS] = None
    return list(found)


def places_of(cell: Cell, model: str, batch: str) -> dict[Call, str]:
    """Where the functions that make `cell` stand. model, batch: where its model and its batch do."""
    return {call: batch if call == (cell.batch, BATCH_ARGUMENTS) else model for call in calls_of([cell])}


def check_allowed(places: Mapping[Call, str], cells: Iterable[Cell], allowed: bool) -> None:
    """Raises UserError where a cell is made by a function, and nobody has allowed to import it.

    places: where the functions stand.
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
