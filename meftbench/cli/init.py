"""`meftbench init`: a suite, its budgets and a CI job, in a repository of one's own."""

from __future__ import annotations

import shlex
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meftbench.cli.options import AllowCode, AsJson, Batch, Model, Quiet, say_written
from meftbench.cli.output import put
from meftbench.errors import CELLS_FAILED, DONE
from meftbench.escapes import path_text

if TYPE_CHECKING:
    from meftbench.records.store import Run
    from meftbench.starting import Start


def init(
    model: Model,
    method: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated: lora+checkpoint. Default: full, lora and lora+checkpoint."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a step. Default: 4.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens a sample. Default: 128, or what the model has.")
    ] = None,
    batch: Batch = None,
    name: Annotated[str | None, typer.Option(help="Of the suite. Default: from the model's.")] = None,
    out: Annotated[Path, typer.Option(help="The repository's folder.")] = Path(),
    gitlab: Annotated[bool, typer.Option("--gitlab", help="A job for GitLab instead of GitHub.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Run the suite, and fill the budgets with what it counts.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write what holds MODEL to memory budgets in your own repository: suites/NAME.yaml, its budgets, and a job for CI.

    Writes all three files or none. Exits 2 where one is there already. With --run, exits 3 where a cell did not end ok.
    """
    from meftbench.starting import start_of, write_all

    start = start_of(
        model,
        method or [],
        batch_size,
        sequence_length,
        name=name,
        out=out,
        batch=batch,
        allow_code=allow_code,
        gitlab=gitlab,
    )
    files = start.files()
    write_all(out, files, force)
    paths = [out / file for file in files]
    say_written(paths, as_json, lambda: put(*(f"{path_text(path)}: written" for path in paths)))
    commands = [] if out.resolve() == Path.cwd() else [f"cd {shlex.quote(str(out))}"]
    if not run:
        folder = f"runs/{start.name}"
        commands += [f"meftbench run {start.name} --out {folder}", f"meftbench check {folder} --update"]
        _say_next(commands, as_json)
        return
    with chdir(out):
        finished = _fill(start, quiet, as_json)
    commands += [f"git add {shlex.join(str(file) for file in files)}"]
    _say_next(commands, as_json)
    raise typer.Exit(DONE if all(record.status == "ok" for record in finished.records) else CELLS_FAILED)


def _say_next(commands: list[str], as_json: bool) -> None:
    if not as_json:
        put(f"next: {' && '.join(commands)}")


def _fill(start: Start, quiet: bool, as_json: bool) -> Run:
    """Run the suite in the working folder, set its budgets to what was counted, and return the run."""
    from meftbench.cli.progress import progress
    from meftbench.plan.budgets import load_budgets
    from meftbench.plan.suite import load_suite
    from meftbench.report.render.terminal import print_summary
    from meftbench.runner import run_suite
    from meftbench.runner.folder import default_folder
    from meftbench.verdicts.update import updated

    with progress(quiet, False) as tell:
        finished = run_suite(load_suite(str(start.suite_file)), default_folder(start.name), on_event=tell)
    update = updated(finished, load_budgets(start.budgets_file))
    update.write()
    if not as_json:
        print_summary(finished)
        put(f"{path_text(start.budgets_file)}: filled with what was counted", *update.kept)
    return finished
