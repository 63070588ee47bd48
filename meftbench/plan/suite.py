"""From a suite file to its cells, all of which are checked before anything is run (docs/measuring.md 1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from meftbench.documents import guarded
from meftbench.errors import unknown
from meftbench.plan.axes import AXES
from meftbench.plan.budgets import load_budgets
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
    """Allow a single value in the JSON Schema, as `_as_list` does, so that editors do not mark it as wrong."""
    for name, axis in schema["properties"].items():
        schema["properties"][name] = {"anyOf": [axis["items"], axis]}


_GRID_FIELDS: dict[str, Any] = {
    name: (Annotated[list[type_of(axis)], BeforeValidator(_as_list)], [])  # type: ignore[misc]
    for name, axis in AXES.items()
    if axis.in_grid
}


class Grid(create_model("Lists", __base__=Strict, **_GRID_FIELDS)):  # type: ignore[misc]
    """A value or a list of values for each axis; the cells of the grid are their product."""

    model_config = ConfigDict(json_schema_extra=_one_or_a_list)


class SuiteFile(BaseModel):
    """The keys of a suite file.

    tasks: an axis of the grid: each cell is trained on one task, as `training` says, and scored. Without tasks, only
        steps are measured.
    defaults: values of axes for all cells whose point does not give them.  include: further cells beside the grid.
    exclude: cells to leave out: those that have all values of an entry.
    allow_code: whether the user's own functions (models and batches named `module:function`) may be imported.
    budgets: path of a budgets file, relative to the suite file.
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
    """A checked suite: its cells in the order in which they are listed, and how to measure them.

    source: the file it was read from.  command: the command line that it was made from instead, without `meftbench`.
    code: the calls of the user's own functions (models and batches), each with its place in the suite.
    allow_code: whether these functions may be imported.
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
        """Hash of what is run and how it is measured; it does not depend on the name and the description."""
        return digest([self.protocol.protocol_id, sorted(cell.cell_id for cell in self.cells)])

    def on(self, device: str) -> Suite:
        """The same suite with every cell on `device`."""
        return replace(self, cells=tuple(cell.model_copy(update={"device": device}) for cell in self.cells))


def shipped_suites() -> dict[str, Path]:
    """The files of the suites that come with the package, by name."""
    here = Path(__file__).resolve().parents[1]
    folder = next((f for f in (here / "shipped_suites", here.parent / "suites") if f.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder else []
    return {file.stem: file for file in files if not file.name.endswith(".budgets.yaml")}


def find_suite(name: str) -> Path:
    """The file that `name` means: a path, ./suites/NAME.yaml, or a suite of the package, in this order.

    Raises UserError: there is no suite of that name.
    """
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
    document = read(file)
    with guarded(str(file)):
        return parse_suite(document)


def parse_suite(document: Document) -> Suite:
    """The suite of a parsed file. Raises UserError: at the first fault, with file, line, key path and cure."""
    _check_schema(document)
    parsed = validated(document, SuiteFile)
    for key in ("include", "exclude"):
        if len(entries := getattr(parsed, key)) > MAX_CELLS:
            what = f"has {len(entries):,} entries"
            raise document.error((key,), what, f"at most {MAX_CELLS:,} cells are run: split the suite")
    exclusions = [_exclusion(document, ("exclude", i), point) for i, point in enumerate(parsed.exclude)]
    cells: dict[str, Cell] = {}
    unmatched = {(i, axis) for i, exclusion in enumerate(exclusions) for axis in exclusion}
    without_cell = set(range(len(exclusions)))
    code: dict[Call, str] = {}
    for places, values in itertools.chain(_grid_points(document, parsed), _included(parsed.include)):
        point = _default_values(parsed.defaults, "defaults", places) | values
        for cell in _cells(document, places, point, parsed.training):
            unmatched -= {(i, axis) for i, axis in unmatched if _matches(cell, {axis: exclusions[i][axis]})}
            excluded_by = {i for i, exclusion in enumerate(exclusions) if _matches(cell, exclusion)}
            without_cell -= excluded_by
            if not excluded_by:
                cells.setdefault(cell.cell_id, cell)
                where = (document.where(places.get(axis, ())) for axis in ("model", "batch"))
                code = places_of(cell, *where) | code
    for index, axis in sorted(unmatched):
        _refuse_absent(document, ("exclude", index, axis), parsed.exclude[index])
    for index in sorted(without_cell):
        what = "no cell of the suite has all of these values at once"
        raise document.error(("exclude", index), what, "leave the entry out, or name what stands together in a cell")
    if not cells:
        cure = "name at least one model, method, batch_size and sequence_length"
        raise document.error(("grid",), "no cell is left", cure)
    if any(cell.training for cell in cells.values()):
        # Cells of the first seed come first, since their scores may decide the learning rate of the other seeds.
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
        load_budgets(budgets)  # so that what is wrong with them is said now, and only budgets are copied into a run
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
    version = document.content.get("schema")
    if isinstance(version, int) and not isinstance(version, bool) and version > 1:
        cure = "update meftbench, or write `schema: 1`"
        raise document.error(("schema",), f"schema {version} is newer than this program (1)", cure)


# --- points: pairs of the places of the values in the document, and the values, both by axis ---


def _grid_points(document: Document, suite: SuiteFile) -> Iterator[tuple[Places, dict[str, Any]]]:
    axes = {"task": suite.tasks} if suite.tasks else {}
    axes |= {name: getattr(suite.grid, name) for name in Grid.model_fields if getattr(suite.grid, name)}
    for name in Grid.model_fields:
        if (document.content.get("grid") or {}).get(name) == []:
            raise document.error(("grid", name), "names nothing", "write a value, or leave the axis out")
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


def _default_values(defaults: Point, key: str, places: Places) -> dict[str, Any]:
    """The values that `defaults` gives; their places under `key` are added to `places` for axes that have none."""
    values: dict[str, Any] = defaults.model_dump(exclude_none=True)
    for name in values:
        places.setdefault(name, (key, name))
    return values


def _cells(document: Document, places: Places, values: dict[str, Any], training: Trainings) -> Iterator[Cell]:
    """The cell of a point; for a point with a task, a cell for each learning rate."""
    if "task" not in values:
        if "learning_rate" in values:
            place = places["learning_rate"]
            raise document.error(place, "says how to train, and there is no task", "name one under `tasks`")
        yield cell_at(document, places, values)
        return
    root = places.get("", ("grid",))
    require(document, root, values, "model", "method")
    task, place = values["task"], places["task"]
    length_of_task = isinstance(task, dict) and task.get("sequence_length") is not None
    for point in with_training(document, places, values, training):
        length_place = (*place, "sequence_length") if length_of_task else places.get("sequence_length", place)
        yield cell_at(document, places | {"sequence_length": length_place}, point)


def _exclusion(document: Document, path: KeyPath, point: Point) -> dict[str, Any]:
    """The values, by axis, of the cells to leave out. Raises UserError: a value is wrong, or none is given."""
    values: dict[str, Any] = point.model_dump(exclude_none=True)
    refuse_unknown(document, {name: (*path, name) for name in values}, values)
    if "device" in values:
        parse_device(document.where((*path, "device")), values["device"])
    if "model" in values:
        values["model"] = named(document, (*path, "model"), values["model"], "model")[0]
    if "method" in values:
        values["method"] = parse_method(document, (*path, "method"), values["method"])
    if "task" in values:
        values["task"] = named(document, (*path, "task"), values["task"], "task")[0]
    if not values:
        raise document.error(path, "names nothing", "name the axes of the cells to leave out")
    return values


def _refuse_absent(document: Document, place: KeyPath, point: Point) -> None:
    """Raises UserError: no cell has the value at `place`, which `point` excludes."""
    axis = str(place[-1])
    value = getattr(point, axis)
    what = f"no cell of the suite has {axis} {value if isinstance(value, dict) else repr(value)}"
    raise document.error(place, what, "exclude what the grid or `include` names, as it is written there")


def _matches(cell: Cell, values: dict[str, Any]) -> bool:
    """Whether the cell has all of `values`, which are as `_exclusion` gives them."""
    cell_values = {name: value_on(cell, name) for name in values}
    if "method" in values:
        cell_values["method"] = (cell.method, cell.method_params, cell.levers, cell.lever_params)
    return cell_values == values
