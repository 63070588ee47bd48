"""From a suite file to its cells: what is to be run, checked in full before anything starts (MEASURING 3.1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meftbench.errors import unknown
from meftbench.plan.catalogue import ATTENTIONS, HEADS, LEVERS, METHODS, OPTIMIZERS, PRECISIONS
from meftbench.plan.cell import Cell, Levers
from meftbench.plan.config_values import check_values
from meftbench.plan.factories import Call, check_arguments, check_own, is_factory, places_of
from meftbench.plan.identity import digest
from meftbench.plan.models import attention_of, check_head, check_method, check_model, check_sequence_length
from meftbench.plan.peft_names import NOT_APPLICABLE, PEFT_METHODS, positions_taken
from meftbench.plan.profiles import PREDICTED, find_profile
from meftbench.plan.protocol import Protocol
from meftbench.plan.quality import with_training
from meftbench.plan.strict_yaml import Document, KeyPath, name_place, named, read, validated, validated_part
from meftbench.plan.training import Positive, Trainings

MAX_CELLS = 10_000
_OF_TRAINING = ("task", "learning_rate")  # axes that are no fields of a cell


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Named = Any  # "meft1", or {name: meft1, adapter_size: 8}
Size = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Point(_Strict):
    """The axes of a cell; None: not said here."""

    model: Named | None = None
    method: Named | None = None
    batch_size: Size | None = None
    micro_batch_size: Size | None = None
    sequence_length: Size | None = None
    precision: str | None = None
    head: str | None = None
    attention: str | None = None
    optimizer: str | None = None
    optimizer_impl: Literal["foreach", "fused", "loop"] | None = None
    device: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    task: Named | None = None
    learning_rate: Positive | None = None
    batch: str | None = None


T = TypeVar("T")
Axis = Annotated[list[T], BeforeValidator(_as_list)]


def _one_or_a_list(schema: dict[str, Any]) -> None:
    """Say in the JSON Schema what `_as_list` accepts, so that editors do not mark it."""
    for name, axis in schema["properties"].items():
        schema["properties"][name] = {"anyOf": [axis["items"], axis]}


class Grid(_Strict):
    """Each axis a value or a list; the grid is their product."""

    model_config = ConfigDict(json_schema_extra=_one_or_a_list)

    model: Axis[Named] = []
    method: Axis[Named] = []
    batch_size: Axis[Size] = []
    micro_batch_size: Axis[Size] = []
    sequence_length: Axis[Size] = []
    precision: Axis[str] = []
    head: Axis[str] = []
    attention: Axis[str] = []
    optimizer: Axis[str] = []
    optimizer_impl: Axis[Literal["foreach", "fused", "loop"]] = []
    device: Axis[str] = []
    seed: Axis[Annotated[int, Field(ge=0)]] = []
    learning_rate: Axis[Positive] = []
    batch: Axis[str] = []


class SuiteFile(_Strict):
    """The keys of a suite file.

    tasks: an axis of the grid: each cell is trained on one, as `training` says, and scored; none: steps are measured.
    allow_code: whether models and batches that are functions, `module:function`, may be imported.
    """

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str = ""
    allow_code: bool = False
    protocol: Protocol = Protocol()
    defaults: Point = Point()
    grid: Grid = Grid()
    tasks: Axis[Named] = []
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
    code: dict[Call, str] = {}
    for places, values in itertools.chain(_grid_points(document, parsed), _included(parsed.include)):
        point = _said(parsed.defaults, "defaults", places) | values
        for cell in _cells(document, places, point, parsed.training):
            if not any(_matches(cell, wanted) for wanted in excluded):
                cells.setdefault(cell.cell_id, cell)
                where = (document.where(places.get(axis, ())) for axis in ("model", "batch"))
                code = places_of(cell, *where) | code
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

Places = dict[str, KeyPath]


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
    values = defaults.model_dump(exclude_none=True)
    for name in values:
        places.setdefault(name, (key, name))
    return values


def _cells(document: Document, places: Places, values: dict[str, Any], training: Trainings) -> Iterator[Cell]:
    """The cell of a point; where it has a task, one for each learning rate."""
    if "task" not in values:
        if "learning_rate" in values:
            place = places["learning_rate"]
            raise document.error(place, "says how to train, and there is no task", "name one under `tasks`")
        yield _cell(document, places, values)
        return
    root = places.get("", ("grid",))
    _require(document, root, values, "model", "method")
    task, place = values["task"], places["task"]
    of_task = isinstance(task, dict) and task.get("sequence_length") is not None
    for point in with_training(document, places, values, training):
        length = (*place, "sequence_length") if of_task else places.get("sequence_length", place)
        yield _cell(document, places | {"sequence_length": length}, point)


def _require(document: Document, root: KeyPath, values: dict[str, Any], *names: str) -> None:
    for required in names:
        if required not in values:
            raise document.error((*root, required), "is missing", f"name a {required} here or under `defaults`")


def _cell(document: Document, places: Places, values: dict[str, Any]) -> Cell:
    root = places.get("", ("grid",))
    _require(document, root, values, "model", "method", "batch_size", "sequence_length")
    place = {name: places.get(name, (*root, name)) for name in Point.model_fields}
    model, beside = named(document, place["model"], values["model"], "model")
    overrides = _config(document, place["model"], beside)
    check_arguments(document.where((*place["model"], "config")), overrides)
    method, levers, params = parse_method(document, place["method"], values["method"])
    of_model = document.where(name_place(place["model"], values["model"]))
    of_method = document.where(name_place(place["method"], values["method"]))
    batch = values["batch_size"]
    micro = values.get("micro_batch_size", batch)
    if batch % micro:
        what = f"micro_batch_size {micro} does not divide batch_size {batch}"
        raise document.error(place["micro_batch_size"], what, f"write a divisor of {batch}")
    _refuse_unknown(document, place, values)
    if method == "full" and values.get("precision") == "nf4":
        cure = "choose another method, or precision: bf16"
        raise document.error(place["precision"], "4-bit weights cannot be trained", cure)
    device = parse_device(document.where(place["device"]), values.get("device", "counted"))
    _check_training(document, place, values, device)
    check_model(of_model, model, overrides)
    check_own(document, place, model, values)
    if not is_factory(model):
        check_values(document, (*place["model"], "config"), overrides)
    check_head(document.where(place["head"]), model, overrides, values.get("head"))
    check_method(of_method, model, overrides, values.get("head"), method)
    taken = positions_taken(method, params)
    check_sequence_length(document.where(place["sequence_length"]), model, overrides, values["sequence_length"], taken)
    return Cell(
        model=model,
        model_config_overrides=overrides,
        method=method,
        method_params=params,
        levers=levers,
        batch_size=batch,
        micro_batch_size=micro,
        sequence_length=values["sequence_length"],
        precision=values.get("precision", "fp32"),
        head=values.get("head"),
        attention_requested=attention_of(document.where(place["attention"]), model, overrides, values.get("attention")),
        optimizer=values.get("optimizer", "adamw"),
        optimizer_impl=values.get("optimizer_impl"),
        device=device,
        seed=values.get("seed", 0),
        training=values.get("training"),
        batch=values.get("batch"),
    )


def _check_training(document: Document, place: Places, values: dict[str, Any], device: str) -> None:
    if values.get("training") is None:
        if values.get("head") == "multiple_choice":
            raise document.error(place["head"], "needs a task, whose choices it reads", "name one under `tasks`")
    elif device.startswith(PREDICTED):
        raise document.error(place["device"], "a training cannot be predicted", "write device: counted or cuda")
    elif values.get("precision") == "fp16-autocast" and device == "counted":
        raise document.error(place["precision"], "fp16 is not trained in on a CPU", "write precision: bf16-autocast")


def cell_of(verb: str, values: dict[str, Any]) -> Cell:
    """The cell of one point, given on the command line of `verb`. Raises UserError, as for a suite."""
    document = Document(Path(verb), values, {})
    said = validated(document, Point).model_dump(exclude_none=True)
    return _cell(document, {name: (name,) for name in Point.model_fields}, said)


def _config(document: Document, place: KeyPath, beside_name: dict[str, Any]) -> dict[str, Any]:
    """Fields of a model's configuration. Raises UserError: another key beside its name, or no mapping."""
    for key in beside_name:
        if key != "config":
            raise unknown(document.where((*place, key), key=True), "key", key, ["name", "config"])
    fields = beside_name.get("config", {})
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        what = f"{fields!r} is no mapping of fields to values"
        raise document.error((*place, "config"), what, "write config: {num_hidden_layers: 4}")
    return dict(fields)


_CLOSED = {"precision": PRECISIONS, "head": HEADS, "attention": ATTENTIONS, "optimizer": OPTIMIZERS}


def _refuse_unknown(document: Document, places: Places, values: dict[str, Any]) -> None:
    for key, known in _CLOSED.items():
        if key in values and values[key] not in known:
            raise unknown(document.where(places[key]), key, values[key], known)


def parse_device(where: str, device: str) -> str:
    """`counted`, `cuda`, or `predicted:` and a profile. Raises UserError for anything else."""
    if device.startswith(PREDICTED):
        find_profile(device.removeprefix(PREDICTED), where)
    elif device not in ("counted", "cuda"):
        raise unknown(where, "device", device, ["counted", "cuda", f"{PREDICTED}PROFILE"])
    return device


def parse_method(document: Document, path: KeyPath, value: Any) -> tuple[str, Levers, dict[str, Any]]:
    """Method, levers and settings of "lora+checkpoint" or {name: meft1, adapter_size: 8}. Raises UserError."""
    text, settings = named(document, path, value, "method")
    name, *levers = text.split("+")
    place = name_place(path, value)
    if name in NOT_APPLICABLE:
        raise document.error(place, f"{name} does not apply: {NOT_APPLICABLE[name].reason}", "choose another method")
    if name not in METHODS:
        raise unknown(document.where(place), "method", name, METHODS)
    for lever in levers:
        if lever not in LEVERS:
            raise unknown(document.where(place), "lever", lever, LEVERS)
        if levers.count(lever) > 1:
            raise document.error(place, f"lever {lever!r} is named twice", "name it once")
        if name in PEFT_METHODS and lever in PEFT_METHODS[name].refuses:
            raise document.error(place, f"{text}: {PEFT_METHODS[name].refuses[lever]}", f"leave {lever} out")
    schema = METHODS[name].settings
    checked = validated_part(document, path, settings, schema)
    said = checked.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return name, Levers(**dict.fromkeys(levers, True)), said


def _wanted(document: Document, path: KeyPath, point: Point) -> dict[str, Any]:
    wanted = point.model_dump(exclude_none=True)
    _refuse_unknown(document, {name: (*path, name) for name in wanted}, wanted)
    if "device" in wanted:
        parse_device(document.where((*path, "device")), wanted["device"])
    if "model" in wanted:
        wanted["model"] = named(document, (*path, "model"), wanted["model"], "model")[0]
    if "method" in wanted:
        wanted["method"] = parse_method(document, (*path, "method"), wanted["method"])
    if "task" in wanted:
        wanted["task"] = named(document, (*path, "task"), wanted["task"], "task")[0]
    if "attention" in wanted:
        wanted["attention_requested"] = wanted.pop("attention")
    if not wanted:
        raise document.error(path, "names nothing", "name the axes of the cells to leave out")
    return wanted


def _matches(cell: Cell, wanted: dict[str, Any]) -> bool:
    found = {name: getattr(cell.training if name in _OF_TRAINING else cell, name, None) for name in wanted}
    if "method" in wanted:
        found["method"] = (cell.method, cell.levers, cell.method_params)
    return found == wanted
