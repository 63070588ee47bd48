"""`meftbench list`: what a suite may name, and what the numbers mean."""

from __future__ import annotations

import shutil
import textwrap
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meftbench.cli import completion
from meftbench.cli.options import say_next
from meftbench.cli.output import put, put_json
from meftbench.errors import UserError
from meftbench.escapes import single_line
from meftbench.schemas import FOLDER, FORMATS, schema_of

if TYPE_CHECKING:
    from meftbench.catalogue.settings import Settings


_NARROWEST = 24  # characters that a summary has at least beside its name


class Kind(StrEnum):
    methods = "methods"
    models = "models"
    optimizers = "optimizers"
    tasks = "tasks"
    suites = "suites"
    metrics = "metrics"
    profiles = "profiles"
    schema = "schema"
    schemas = "schemas"


def list_(
    kind: Annotated[
        Kind,
        typer.Argument(help="What to list. `schemas`: published formats; `schema NAME`: the one of that name."),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            help="Of `schema`: a name of `list schemas`. Default: suite.", autocompletion=completion.schemas
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what can be named: methods, models, optimizers, tasks, suites, metrics, device profiles.

    `list schemas` lists the published formats, of files and of what commands print with --json; `list schema NAME`
    prints the JSON Schema (draft 2020-12) of one.
    """
    if name is not None and kind is not Kind.schema:
        raise UserError("list", f"{kind} takes no name, and {name!r} is given", f"write `meftbench list {kind}`")
    content = schema_of(name or "suite") if kind is Kind.schema else LISTINGS[kind]()
    if as_json or kind is Kind.schema:
        put_json(content, indent=2)
        return
    put(*_lines(content, shutil.get_terminal_size().columns))
    say_next(_NEXT[kind])


def _lines(content: dict[str, Any], width: int) -> list[str]:
    """A name at the beginning of a line, and its summary and settings beside it, wrapped at `width` characters."""
    names = {name: single_line(name) for name in content}  # those of suites are names of files
    column = max(map(len, names.values()), default=0) + 2
    texts = []
    for key, about in content.items():
        settings = " ".join(f"{name}={value}" for name, value in about.get("settings", {}).items())
        room = max(_NARROWEST, width - column)
        parts = [part for text in (about["summary"], settings) for part in textwrap.wrap(text, room)]
        texts += [f"{names[key]:<{column}}{parts[0] if parts else ''}".rstrip()]
        texts += [" " * column + part for part in parts[1:]]
    return texts


def methods() -> dict[str, Any]:
    """Methods with the defaults of their settings, memory optimisations (levers) added to a method by `+`, and methods
    of peft that do not apply."""
    from meftbench.catalogue.levers import LEVERS
    from meftbench.catalogue.methods import METHODS
    from meftbench.catalogue.peft_methods import NOT_APPLICABLE

    listed: dict[str, Any] = {
        name: {"summary": method.summary, "settings": _defaults(method.settings)} for name, method in METHODS.items()
    }
    listed |= {
        f"+{name}": {"summary": lever.summary} | ({"settings": _defaults(lever.settings)} if lever.settings else {})
        for name, lever in LEVERS.items()
    }
    return listed | {name: {"summary": f"does not apply: {row.reason}"} for name, row in NOT_APPLICABLE.items()}


def _defaults(settings: type[Settings]) -> dict[str, Any]:
    """The default of each setting; "required" where it has none."""
    required = {name: "required" for name, field in settings.model_fields.items() if field.is_required()}
    defaults = settings.model_construct().model_dump(mode="json", by_alias=True, warnings=False)
    return required | defaults if required else settings().model_dump(mode="json", by_alias=True)


def models() -> dict[str, Any]:
    """Models by name, and the rank at which LoRA trains as many parameters as MEFT does with its default adapters.

    With `@random` after its name, a model needs no download.
    """
    from meftbench.catalogue.models import MODELS
    from meftbench.plan.equal_parameters import matching_rank

    ranks = {name: matching_rank({"model_type": model.model_type} | model.config) for name, model in MODELS.items()}
    return {
        name: {
            "summary": f"{model.summary} ({model.hub}); lora of rank {ranks[name]} trains as much as meft",
            "matching_rank": ranks[name],
        }
        for name, model in MODELS.items()
    }


def tasks() -> dict[str, Any]:
    """Tasks for `finetune` and for `tasks:` of a suite; a folder with data and task.yaml is one as well."""
    from meftbench.catalogue.tasks import TASKS

    return {
        name: {"summary": f"{task.summary} ({', '.join(task.scores)})", "settings": {"folder": task.folder}}
        for name, task in TASKS.items()
    }


def suites() -> dict[str, Any]:
    """Suites of the package and of ./suites, with their descriptions; where names are equal, that of ./suites."""
    from pathlib import Path

    from meftbench.plan.suite import shipped_suites
    from meftbench.strict_yaml import read

    local = {file.stem: file for file in sorted(Path("suites").glob("*.yaml")) if ".budgets" not in file.name}
    return {
        name: {"summary": str(read(file).content.get("description", "")), "file": str(file)}
        for name, file in sorted((shipped_suites() | local).items())
    }


def optimizers() -> dict[str, Any]:
    """Optimizers, as the axis `optimizer` and the option --optimizer name them."""
    from meftbench.catalogue.optimizers import OPTIMIZERS

    return {name: {"summary": optimizer.summary} for name, optimizer in OPTIMIZERS.items()}


def metrics() -> dict[str, Any]:
    """Every metric of a record: its unit, which direction is better, and what it means."""
    from meftbench.catalogue.metrics import METRICS

    return {
        name: {"summary": f"[{kind.unit}, {kind.better}] {kind.meaning}", "unit": kind.unit, "better": kind.better}
        for name, kind in METRICS.items()
    }


def profiles() -> dict[str, Any]:
    """Devices that memory can be predicted for: `--device predicted:NAME`."""
    from meftbench.catalogue.profiles import PROFILES
    from meftbench.units import format_bytes

    return {
        name: {
            "summary": f"{profile.device}, {format_bytes(profile.memory_bytes)}, cc {profile.compute_capability}, "
            f"{'verified' if profile.verified else 'unverified'}"
        }
        | profile.model_dump(exclude={"schema_"})
        for name, profile in PROFILES.items()
    }


def schemas() -> dict[str, Any]:
    """The published formats: what has each, and the file of its JSON Schema in the package."""
    return {name: {"summary": what, "file": str(FOLDER / f"{name}.schema.json")} for name, (_, what) in FORMATS.items()}


# What people do with a name of each listing.
_NEXT: dict[Kind, tuple[str, ...]] = {
    Kind.methods: ("estimate", "MODEL", "METHOD"),
    Kind.models: ("plan", "MODEL", "--memory", "24GiB"),
    Kind.optimizers: ("estimate", "MODEL", "METHOD", "--optimizer", "NAME"),
    Kind.tasks: ("finetune", "MODEL", "METHOD", "TASK"),
    Kind.suites: ("run", "SUITE", "--dry-run"),
    Kind.metrics: ("show", "RUN", "CELL"),
    Kind.profiles: ("estimate", "MODEL", "METHOD", "--profile", "NAME"),
    Kind.schemas: ("list", "schema", "NAME"),
}

LISTINGS = {
    Kind.methods: methods,
    Kind.models: models,
    Kind.optimizers: optimizers,
    Kind.tasks: tasks,
    Kind.suites: suites,
    Kind.metrics: metrics,
    Kind.profiles: profiles,
    Kind.schemas: schemas,
}
