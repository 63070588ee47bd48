"""`meftbench export`: a run in the formats of trackers and tables, a predicted step as a snapshot or a figure."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meftbench.cli import completion
from meftbench.cli.options import (
    Allocator,
    AllowCode,
    Attention,
    Batch,
    ForVersions,
    Head,
    MicroBatchSize,
    Optimizer,
    Override,
    Packing,
    Parallelism,
    Precision,
    ProfileName,
    Quiet,
    Setting,
    WorldSize,
    pairs,
    progress,
    say_next,
    say_written,
)
from meftbench.cli.output import put
from meftbench.errors import UserError, unknown
from meftbench.escapes import path_text
from meftbench.plan.defaults import PROFILE

if TYPE_CHECKING:
    from meftbench.plan.cell import Cell
    from meftbench.records.store import Run


class Format(StrEnum):
    csv = "csv"
    json = "json"
    parquet = "parquet"
    junit = "junit"
    github_action_benchmark = "github-action-benchmark"
    bmf = "bmf"
    pytorch_v3 = "pytorch-v3"
    badge = "badge"
    memory_viz = "memory_viz"
    timeline = "timeline"


_PREDICTED = (Format.memory_viz, Format.timeline)
_PANELS = 12  # in one figure; more would be too small to read
_SHAPE = "--batch-size and --sequence-length"


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run folder (it has a records.jsonl); any other is a model.",
            autocompletion=completion.runs_and_models,
        ),
    ],
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CELL|METHOD", help="Of RUN: starts of cell_ids, or globs on labels. Of MODEL: its methods."
        ),
    ] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="See above. Default: csv of RUN, memory_viz of MODEL.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; text goes to stdout without. A figure is two."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="For trackers, of RUN: this metric; may be repeated.", autocompletion=completion.metrics),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of MODEL: samples a step.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Of MODEL: tokens a sample.")] = None,
    micro_batch_size: MicroBatchSize = None,
    precision: Precision = None,
    attention: Attention = None,
    head: Head = None,
    optimizer: Optimizer = None,
    packing: Packing = None,
    world_size: WorldSize = None,
    parallelism: Parallelism = None,
    config: Override = None,
    settings: Setting = None,
    batch: Batch = None,
    allow_code: AllowCode = False,
    profile: ProfileName = None,
    allocator: Allocator = "",
    for_versions: ForVersions = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Of RUN: same as --format json. Of files: one JSON object with their names.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write what others read, of a run or of cells that are only named.

    export RUN [CELL...] --format csv|json|parquet|junit: a row or a test case a cell.
    export RUN [CELL...] --format github-action-benchmark|bmf|pytorch-v3: for trackers.
    export RUN --format badge: whether its budgets hold, as JSON from which shields.io draws a badge.
    export RUN [CELL...] --format memory_viz|timeline: the cells, predicted again.
    export MODEL METHOD... --batch-size N --sequence-length N: predicted, without a run.

    RUN is a folder that has a records.jsonl; anything else is a MODEL, its folder too.
    memory_viz is a snapshot for pytorch.org/memory_viz: every allocation of one cell since
    its model was built. timeline is a figure: live bytes by category, a panel a cell.
    """
    from meftbench.asked import asked_cell
    from meftbench.plan.factories import check_allowed
    from meftbench.records.store import RECORDS

    tell = progress(quiet)
    shape = {"batch_size": batch_size, "sequence_length": sequence_length, "micro_batch_size": micro_batch_size}
    rest: dict[str, Any] = {
        "precision": precision,
        "attention": attention,
        "head": head,
        "optimizer": optimizer,
        "packing": packing,
    }
    rest |= {"batch": batch, "world_size": world_size, "parallelism": parallelism}
    if (Path(what) / RECORDS).is_file():
        for name, value in {**shape, **rest, "config": config, "set": settings}.items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(option, f"{what} is a run, and its cells are as they are", f"leave {option} out")
        loaded = _selected_run(Path(what), which or [])
        if format_ not in _PREDICTED:
            of_run = format_ or (Format.json if as_json else Format.csv)
            if files := _write_run(loaded, of_run, output, metric, as_json):
                say_written(files, as_json, lambda: None)
                say_next(("report", what), ("show", what), as_json=as_json)
        else:
            run_profile, cells, conf = _cells_on_profile(loaded, profile)
            check_allowed({}, cells, allow_code)
            allocation = allocator or conf
            _write_predicted(cells, run_profile, allocation, for_versions, format_, output, tell, allow_code, as_json)
        return
    if format_ not in (None, *_PREDICTED):
        cure = "name a folder that `meftbench run` wrote, with its records.jsonl"
        raise UserError(what, f"is no run, and --format {format_} is of a run", cure)
    if not which:
        cure = f"write `meftbench export MODEL METHOD` with {_SHAPE}, or name a folder that `meftbench run` wrote"
        raise UserError(what, "is no run, and no METHOD is named", cure)
    if batch_size is None or sequence_length is None:
        raise UserError("export", f"{what} is no run, and the shape of the cell is not given", f"add {_SHAPE}")
    chosen = profile or PROFILE
    overrides, of_method = pairs("--config", config), pairs("--set", settings)
    cells = [
        asked_cell("export", what, method, chosen, overrides, of_method, allow_code, **shape, **rest)
        for method in which
    ]
    kind = format_ or Format.memory_viz
    _write_predicted(cells, chosen, allocator, for_versions, kind, output, tell, allow_code, as_json)


# --- formats of a run ---


def _selected_run(folder: Path, which: list[str]) -> Run:
    """The run with the cells that `which` names, all if it is empty. Raises UserError (exit 5): a name matches none."""
    from dataclasses import replace

    from meftbench.records.store import load_run, warn_of_left_out
    from meftbench.report.views.cells import find_records

    run = load_run(folder)
    warn_of_left_out(run)
    if not which:
        return run
    record_ids = {record.record_id for name in which for record in find_records(run, name)}
    return replace(run, records=[record for record in run.records if record.record_id in record_ids])


def _write_run(run: Run, format_: Format, output: Path | None, metric: list[str] | None, as_json: bool) -> list[Path]:
    """Write or print a run. Returns the files that were written, which are said unless `as_json`."""
    from meftbench.catalogue.metrics import METRICS
    from meftbench.records.store import write_named
    from meftbench.report.render import trackers

    for name in metric or []:
        if name not in METRICS:
            raise unknown("--metric", "metric", name, METRICS)
    metrics = metric or trackers.TRACKED
    if format_ is Format.parquet:
        file = output or Path(f"{run.path.resolve().name}.parquet")
        table = trackers.run_parquet(run)
        _written(file, lambda: write_named(file, table), as_json)
        return [file]
    if format_ is Format.github_action_benchmark:
        base, files = output or Path("benchmark.json"), []
        for side, text in trackers.github_action_benchmark(run, metrics).items():
            part = base.with_name(f"{base.stem}-{side}{base.suffix or '.json'}")
            _write_text(part, text, as_json)
            files.append(part)
            if not as_json:
                put(f"  tool: custom{side.title()}IsBetter")
        return files
    whole, of_metrics = trackers.WHOLE.get(format_), trackers.OF_METRICS.get(format_)
    text = whole(run) if whole else of_metrics(run, metrics) if of_metrics else ""
    if output is None or str(output) == "-":
        put(text)
        return []
    _write_text(output, text, as_json)
    return [output]


def _write_text(file: Path, text: str, as_json: bool) -> None:
    from meftbench.records.store import write_named

    _written(file, lambda: write_named(file, (text + "\n").encode()), as_json)


# --- formats of predicted cells ---


def _cells_on_profile(run: Run, profile: str | None) -> tuple[str, list[Cell], str]:
    """The name of a profile, the run's cells on that device, and the run's allocator settings.

    The profile is that of `--profile`, of the run's predictions, of the device it was measured on, or the default.
    Raises UserError: the device has no profile, or the run was taken with padding.
    """
    from meftbench.catalogue.profiles import PREDICTED
    from meftbench.verdicts import validation

    devices = {str(record.cell.get("device")) for record in run.records}
    if not profile and len(devices) == 1 and (only := devices.pop()) != "counted":
        profile = only.removeprefix(PREDICTED) if only.startswith(PREDICTED) else validation.profile_of(run).name
    chosen = profile or PROFILE
    protocol = validation.protocol_for(run)
    if protocol.padding:
        what = f"was taken with padding ({protocol.padding:g} of each sequence), which cannot be predicted"
        raise UserError(str(run.path), what, "take it with `padding: 0`, or name MODEL METHOD")
    cells = {cell.cell_id: cell for cell in (validation.predicted_cell(record, chosen) for record in run.records)}
    return chosen, list(cells.values()), protocol.alloc_conf


def _write_predicted(
    cells: list[Cell],
    profile: str,
    allocator: str,
    for_versions: str,
    format_: Format,
    output: Path | None,
    tell: Callable[[str], None],
    allow_code: bool,
    as_json: bool,
) -> None:
    from meftbench.catalogue.versions import Versions
    from meftbench.report.figures.timeline import timeline_picture
    from meftbench.runner.predictions import ask

    maximum = 1 if format_ is Format.memory_viz else _PANELS
    if not 1 <= len(cells) <= maximum:
        what = f"{len(cells)} cells are named, and {format_} holds {'one' if maximum == 1 else f'1 to {maximum}'}"
        raise UserError("export", what, "name fewer: the start of a cell_id, or a glob on labels")
    request: dict[str, Any] = {"cells": [cell.model_dump(mode="json") for cell in cells]}
    Versions.parse(for_versions)
    request |= {"profile": profile, "allocator": allocator, "versions": for_versions, "snapshot": None}
    if format_ is Format.memory_viz:
        file = _with_folder(output or Path("snapshot.pickle"))
        ask("export", request | {"snapshot": str(file.absolute())}, tell, allow_code)
        say_written([file], as_json, lambda: put(f"{path_text(file)}: drop it on https://pytorch.org/memory_viz"))
        say_next(("inspect", file), as_json=as_json)
        return
    file = _with_folder(output or Path("timeline"))
    name = file.stem if file.suffix in (".png", ".svg") else file.name
    picture = timeline_picture(ask("export", request, tell, allow_code)["cells"], name)
    try:
        picture.write(file.parent)
    except OSError as error:
        raise _unwritable(file.parent, error) from None
    files = [file.with_name(f"{name}.{kind}") for kind in ("png", "svg")]
    say_written(files, as_json, lambda: put(f"{path_text(files[0])} and {path_text(name)}.svg: written"))


# --- files ---


def _written(file: Path, write: Callable[[], object], as_json: bool) -> None:
    """Write `file`, and print that it was written unless `as_json`. Raises UserError: it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise _unwritable(file, error) from None
    if not as_json:
        put(f"{path_text(file)}: written")


def _with_folder(file: Path) -> Path:
    """`file`, after its folder was made, so that this fails before the work begins. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(file.parent, error) from None
    return file


def _unwritable(file: Path, error: OSError) -> UserError:
    return UserError(str(file), f"cannot be written ({error.strerror or error})", "choose another with -o/--output")
