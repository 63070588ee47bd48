"""From a suite file to its cells: what is to be run, checked in full before anything starts (docs/measuring.md 1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from meftbench.errors import unknown
from meftbench.plan.axes import AXES
from meftbench.plan.cell import Cell, value_on
from meftbench.plan.factories import Call, places_of
from meftbench.plan.fine_tuning import with_training
from meftbench.plan.identity import digest
from meftbench.plan.point import (
    Named,
    Places,
    Point,
    Strict,
    cell_at,
    parse_device,
    parse_method,
    refuse_unknown,
    require,
    type_of,
)
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import Trainings
from meftbench.strict_yaml import Document, KeyPath, named, read, validated

MAX_CELLS = 10_000


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


T = TypeVar("T")
OneOrMore = Annotated[list[T], BeforeValidator(_as_list)]


def _one_or_a_list(schema: dict[str, Any]) -> None:
    """Say in the JSON Schema what `_as_list` accepts, so that editors do not mark it."""
    for name, axis in schema["properties"].items():
        schema["properties"][name] = {"anyOf": [axis["items"], axis]}


_LISTS: dict[str, Any] = {
    name: (Annotated[list[type_of(axis)], BeforeValidator(_as_list)], [])  # type: ignore[misc]
    for name, axis in AXES.items()
    if axis.in_grid
}


class Grid(create_model("Lists", __base__=Strict, **_LISTS)):  # type: ignore[misc]
    """Each axis a value or a list; the grid is their product."""

    model_config = ConfigDict(json_schema_extra=_one_or_a_list)


class SuiteFile(BaseModel):
    """The keys of a suite file.

    tasks: an axis of the grid: each cell is trained on one, as `training` says, and scored; none: steps are measured.
    allow_code: whether models and batches that are functions, `module:function`, may be imported.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str = ""
    allow_code: bool = False
    protocol: Protocol = Protocol()
    defaults: Point = Point()
    grid: Grid = Grid()
    tasks: OneOrMore[Named] = []
    training: Trainings = Trainings()
    include: list[Point] = []
    exclude: list[Point] = []
    budgets: str | None = None


@dataclass(frozen=True)
class Suite:
    """A checked plan: the cells in the order in which they are listed, and how to measure them.

    source: the file it was read from.  command: what else was typed, without `meftbench`, where it is of no file.
    code: how functions of the user's own are called for models and batches, and where each stands.  allow_code:
    whether they may be imported.
    """

    name: str
    description: str
    protocol: Protocol
    cells: tuple[Cell, ...]
    budgets: Path | None
    source: Path | None = None
    command: str | None = None
    code: Mapping[Call, str] = field(default_factory=dict)
    allow_code: bool = False

    @property
    def suite_id(self) -> str:
        """Hash of what is run and how; the name and the description may change."""
        return digest([self.protocol.protocol_id, sorted(cell.cell_id for cell in self.cells)])

    def on(self, device: str) -> Suite:
        """The same suite with every cell on `device`."""
        return replace(self, cells=tuple(cell.model_copy(update={"device": device}) for cell in self.cells))


def shipped_suites() -> dict[str, Path]:
    """Name to file of the suites that come with the package."""
    here = Path(__file__).resolve().parents[1]
    folder = next((f for f in (here / "shipped_suites", here.parent / "suites") if f.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder else []
    return {file.stem: file for file in files if not file.name.endswith(".budgets.yaml")}


def find_suite(name: str) -> Path:
    """A path, ./suites/NAME.yaml, or a shipped suite, in this order. Raises UserError with the nearest name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        return path
    local = Path("suites") / f"{name}.yaml"
    if local.is_file():
        return local
    shipped = shipped_suites()
    if name not in shipped:
        known = {*shipped, *(file.stem for file in Path("suites").glob("*.yaml") if ".budgets" not in file.name)}
        raise unknown("run", "suite", name, known)
    return shipped[name]


def load_suite(name: str) -> Suite:
    """The suite called `name` (see `find_suite`), every cell checked. Raises UserError at the first fault."""
    file = find_suite(name)
    return parse_suite(read(file))


def parse_suite(document: Document) -> Suite:
    """A suite from a parsed file. Raises UserError with file, line, key path and cure."""
    _check_schema(document)
    parsed = validated(document, SuiteFile)
    excluded = [_wanted(document, ("exclude", i), point) for i, point in enumerate(parsed.exclude)]
    cells: dict[str, Cell] = {}
    unmatched = {(i, axis) for i, wanted in enumerate(excluded) for axis in wanted}
    code: dict[Call, str] = {}
    for places, values in itertools.chain(_grid_points(document, parsed), _included(parsed.include)):
        point = _said(parsed.defaults, "defaults", places) | values
        for cell in _cells(document, places, point, parsed.training):
            unmatched -= {(i, axis) for i, axis in unmatched if _matches(cell, {axis: excluded[i][axis]})}
            if not any(_matches(cell, wanted) for wanted in excluded):
                cells.setdefault(cell.cell_id, cell)
                where = (document.where(places.get(axis, ())) for axis in ("model", "batch"))
                code = places_of(cell, *where) | code
    for number, axis in sorted(unmatched):
        _refuse_absent(document, ("exclude", number, axis), parsed.exclude[number])
    if not cells:
        cure = "name at least one model, method, batch_size and sequence_length"
        raise document.error(("grid",), "no cell is left", cure)
    if any(cell.training for cell in cells.values()):
        # Of all seeds the first comes first: it may choose the learning rate of the others.
        cells = dict(sorted(cells.items(), key=lambda item: item[1].seed))
    elif "training" in document.content:
        raise document.error(("training",), "says how to train, and there is no task", "name one under `tasks`")
    if parsed.protocol.padding and any(cell.batch for cell in cells.values()):
        cure = "leave it out: a batch of your own has the padding that it has"
        raise document.error(("protocol", "padding"), "is not for a batch of your own", cure)
    budgets = None
    if parsed.budgets is not None:
        budgets = (document.file.parent / parsed.budgets).resolve()
        if not budgets.is_file():
            cure = "the path is relative to the suite file"
            raise document.error(("budgets",), f"no such file {parsed.budgets!r}", cure)
    return Suite(
        parsed.name,
        parsed.description,
        parsed.protocol,
        tuple(cells.values()),
        budgets,
        document.file,
        code=code,
        allow_code=parsed.allow_code,
    )


def _check_schema(document: Document) -> None:
    schema = document.content.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > 1:
        cure = "update meftbench, or write `schema: 1`"
        raise document.error(("schema",), f"schema {schema} is newer than this program (1)", cure)


# --- points: (where each axis' value stands, the values) ---


def _grid_points(document: Document, suite: SuiteFile) -> Iterator[tuple[Places, dict[str, Any]]]:
    axes = {"task": suite.tasks} if suite.tasks else {}
    axes |= {name: getattr(suite.grid, name) for name in Grid.model_fields if getattr(suite.grid, name)}
    if not axes:
        return
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > MAX_CELLS:
        raise document.error(("grid",), f"has {size:,} cells", f"at most {MAX_CELLS:,} are run: split the suite")
    grid = document.content.get("grid") or {}
    written = {name: grid.get(name) for name in axes} | {"task": document.content.get("tasks")}
    for indices in itertools.product(*(range(len(values)) for values in axes.values())):
        places: Places = {}
        for name, index in zip(axes, indices, strict=True):
            place: KeyPath = ("tasks",) if name == "task" else ("grid", name)
            places[name] = (*place, index) if isinstance(written[name], list) else place
        yield places, {name: axes[name][index] for name, index in zip(axes, indices, strict=True)}


def _included(points: list[Point]) -> Iterator[tuple[Places, dict[str, Any]]]:
    for index, point in enumerate(points):
        values = point.model_dump(exclude_none=True)
        yield {name: ("include", index, name) for name in values} | {"": ("include", index)}, values


def _said(defaults: Point, key: str, places: Places) -> dict[str, Any]:
    values: dict[str, Any] = defaults.model_dump(exclude_none=True)
    for name in values:
        places.setdefault(name, (key, name))
    return values


def _cells(document: Document, places: Places, values: dict[str, Any], training: Trainings) -> Iterator[Cell]:
    """The cell of a point; where it has a task, one for each learning rate."""
    if "task" not in values:
        if "learning_rate" in values:
            place = places["learning_rate"]
            raise document.error(place, "says how to train, and there is no task", "name one under `tasks`")
        yield cell_at(document, places, values)
        return
    root = places.get("", ("grid",))
    require(document, root, values, "model", "method")
    task, place = values["task"], places["task"]
    of_task = isinstance(task, dict) and task.get("sequence_length") is not None
    for point in with_training(document, places, values, training):
        length = (*place, "sequence_length") if of_task else places.get("sequence_length", place)
        yield cell_at(document, places | {"sequence_length": length}, point)


def _wanted(document: Document, path: KeyPath, point: Point) -> dict[str, Any]:
    wanted: dict[str, Any] = point.model_dump(exclude_none=True)
    refuse_unknown(document, {name: (*path, name) for name in wanted}, wanted)
    if "device" in wanted:
        parse_device(document.where((*path, "device")), wanted["device"])
    if "model" in wanted:
        wanted["model"] = named(document, (*path, "model"), wanted["model"], "model")[0]
    if "method" in wanted:
        wanted["method"] = parse_method(document, (*path, "method"), wanted["method"])
    if "task" in wanted:
        wanted["task"] = named(document, (*path, "task"), wanted["task"], "task")[0]
    if not wanted:
        raise document.error(path, "names nothing", "name the axes of the cells to leave out")
    return wanted


def _refuse_absent(document: Document, place: KeyPath, point: Point) -> None:
    axis = str(place[-1])
    value = getattr(point, axis)
    what = f"no cell of the suite has {axis} {value if isinstance(value, dict) else repr(value)}"
    raise document.error(place, what, "exclude what the grid or `include` names, as it is written there")


def _matches(cell: Cell, wanted: dict[str, Any]) -> bool:
    found = {name: value_on(cell, name) for name in wanted}
    if "method" in wanted:
        found["method"] = (cell.method, cell.levers, cell.method_params)
    return found == wanted
