"""`meftbench validate`: how far predictions are from what GPUs measured, in a run, a snapshot, or published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meftbench.cli import completion
from meftbench.cli.options import (
    Allocator,
    AllowCode,
    AsJson,
    Attention,
    Batch,
    ForVersions,
    Head,
    MicroBatchSize,
    Optimizer,
    Override,
    Precision,
    Quiet,
    Setting,
    pairs,
    progress,
    say_next,
)
from meftbench.cli.output import put, put_json
from meftbench.errors import NOTHING_MATCHED, UserError
from meftbench.escapes import path_text
from meftbench.plan.defaults import PROFILE

if TYPE_CHECKING:
    from collections.abc import Callable

_FORMS = "name a run, or SNAPSHOT MODEL METHOD, or --published"


def validate(
    context: typer.Context,
    what: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|SNAPSHOT]",
            help="A folder that `meftbench run` wrote; or a memory snapshot of torch, a file.",
            autocompletion=completion.runs,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Argument(help="Of SNAPSHOT: what was trained.", autocompletion=completion.models)
    ] = None,
    method: Annotated[
        str | None, typer.Argument(help="Of SNAPSHOT: by which method, with levers.", autocompletion=completion.methods)
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="A name of `meftbench list profiles`, or a file. Default: that of RUN's device.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep it in RUN, where `meftbench report` shows it.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Of what others measured: errors by source, quantity and rules.")
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="With --published: every figure, from reports/published/table.csv."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of SNAPSHOT: samples a step.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Of SNAPSHOT: tokens a sample.")] = None,
    first_step: Annotated[
        bool, typer.Option("--first-step", help="SNAPSHOT is of the first step, which makes the optimizer's state.")
    ] = False,
    device: Annotated[int | None, typer.Option(min=0, help="Of SNAPSHOT: which GPU, where it has several.")] = None,
    micro_batch_size: MicroBatchSize = None,
    precision: Precision = None,
    attention: Attention = None,
    head: Head = None,
    optimizer: Optimizer = None,
    config: Override = None,
    settings: Setting = None,
    batch: Batch = None,
    allocator: Allocator = "",
    for_versions: ForVersions = "",
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """How far predictions are from what GPUs measured.

    validate RUN: the cells that a run measured, predicted with its allocator and memory limit; errors of peak memory by
    method, precision and attention. Exits 5 where nothing measured has a prediction.
    validate SNAPSHOT MODEL METHOD --batch-size N --sequence-length N: the step that a snapshot recorded, allocation by
    allocation.
    validate --published: what predictions were held against that others measured and published.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if published:
        if what is not None:
            raise UserError("--published", f"is of no run or snapshot, and {what} is named", "leave one of them out")
        _refuse(given, {"published", "table", "as_json", "quiet"}, "--published takes no such option")
        _published(table, as_json)
        return
    if what is None:
        raise UserError("validate", "nothing is named to hold predictions against", _FORMS)
    if what.is_dir() or (model is None and method is None and not what.exists()):
        taken = {"what", "profile", "save", "allow_code", "as_json", "quiet"}
        _refuse(given, taken, f"is not of a run, and {what} is taken for one")
        _run(what, profile, save, allow_code, as_json, progress(quiet))
        return
    if model is None or method is None or batch_size is None or sequence_length is None:
        cure = "write `meftbench validate SNAPSHOT MODEL METHOD --batch-size N --sequence-length N`"
        raise UserError("validate", f"{what} is a snapshot, and what was trained is not named whole", cure)
    if save:
        raise UserError("--save", f"is of a run, and {what} is a snapshot", "leave it out, or use --json")
    axes = {"micro_batch_size": micro_batch_size, "precision": precision, "attention": attention, "head": head}
    axes |= {"batch_size": batch_size, "sequence_length": sequence_length, "optimizer": optimizer, "batch": batch}
    chosen, overrides, of_method = profile or PROFILE, pairs("--config", config), pairs("--set", settings)
    asked = {"model": model, "method": method, "profile": chosen, "config": overrides, "settings": of_method} | axes
    rules = {"allocator": allocator, "for_versions": for_versions, "first_step": first_step, "device": device}
    _snapshot(str(what), asked, rules, allow_code, as_json, progress(quiet))


def _refuse(given: set[str], taken: set[str], what: str) -> None:
    """Raises UserError: an option was given that this form of the command does not take."""
    for name in sorted(given - taken):
        option = name.upper() if name in ("model", "method") else f"--{name.removesuffix('_').replace('_', '-')}"
        raise UserError(option, what, f"leave {option} out")


def _run(
    folder: Path, profile: str | None, save: bool, allow_code: bool, as_json: bool, tell: Callable[[str], None]
) -> None:
    from meftbench.catalogue.profiles import find_profile
    from meftbench.records.store import load_run, warn_of_left_out
    from meftbench.report.views.validation import validation_text
    from meftbench.verdicts import validation

    loaded = load_run(folder)
    warn_of_left_out(loaded)
    validation.measured_records(loaded)  # raises an error first where nothing was measured, whatever the profile
    if profile:
        find_profile(profile, "--profile")
    else:
        profile = validation.profile_of(loaded).name
    result = validation.validate(loaded, profile, tell, allow_code=allow_code)
    if not result.errors:
        what = f"no cell has a prediction ({'; '.join(result.missing)})"
        raise UserError(str(folder), what, "measure others", NOTHING_MATCHED)
    if save:
        tell(f"{path_text(validation.save(loaded, result))}: written; `meftbench report {path_text(folder)}` shows it")
    if as_json:
        put_json(validation.as_json(result))
    else:
        put(validation_text(result))
    say_next(("report", folder) if save else ("validate", folder, "--save"), as_json=as_json)


def _snapshot(
    file: str,
    asked: dict[str, Any],
    rules: dict[str, Any],
    allow_code: bool,
    as_json: bool,
    tell: Callable[[str], None],
) -> None:
    from meftbench.asked import asked_cell
    from meftbench.catalogue.versions import Versions
    from meftbench.cli.estimate import folded
    from meftbench.report.views.validation import snapshot_validation_lines
    from meftbench.runner.predictions import ask
    from meftbench.verdicts.snapshot_validation import validate_snapshot

    versions = str(Versions.parse(rules["for_versions"]))
    cell = asked_cell("validate", allow_code=allow_code, **asked)
    request = {"file": file, "device": rules["device"]}
    recorded = ask("allocations", request, tell, requests="meftbench.snapshots.inspection")
    begin = "model" if recorded["starts_empty"] else "first step" if rules["first_step"] else "step"
    request = {"cell": cell.model_dump(mode="json"), "profile": asked["profile"], "allocator": rules["allocator"]}
    request |= {"versions": rules["for_versions"], "begin": begin}
    found = validate_snapshot(file, recorded, ask("allocations", request, tell, allow_code), versions)
    if as_json:
        put_json(found.to_json())
    else:
        put(*folded(snapshot_validation_lines(found)))
    say_next(("inspect", file), as_json=as_json)


def _published(table: Path | None, as_json: bool) -> None:
    from meftbench.catalogue.validated import validated_figures
    from meftbench.cli.estimate import folded
    from meftbench.report.views.published import figure_lines, published_lines
    from meftbench.verdicts.published import TABLE, read_table

    content = validated_figures()
    if table is None and TABLE.is_file():
        table = TABLE
    figures = None if table is None else read_table(table)
    if as_json:
        answer = content.model_dump(by_alias=True)
        rows = None if figures is None else json.loads(figures.to_json(orient="records"))
        put_json(answer | {"figures": rows})
        return
    if figures is not None:
        put(*folded(figure_lines(figures)), "")
    lines = published_lines(content)
    if figures is None:
        lines.append("every figure is in meftbench's repository: --table reports/published/table.csv prints them")
    put(*folded(lines))
    say_next(("estimate", "MODEL", "METHOD"), ("list", "profiles"))
