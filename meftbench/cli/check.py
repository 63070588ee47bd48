"""`meftbench check`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meftbench.cli.options import RunFolder, add_to_step_summary, emit, say_next
from meftbench.cli.output import put_error
from meftbench.escapes import single_line, visible

if TYPE_CHECKING:
    from meftbench.plan.budgets import Budgets
    from meftbench.records.store import Run


class Format(StrEnum):
    text = "text"
    json = "json"
    github = "github"
    junit = "junit"
    markdown = "markdown"


class MissingPolicy(StrEnum):
    error = "error"
    warn = "warn"
    ignore = "ignore"


def check(
    run: RunFolder,
    budget: Annotated[Path | None, typer.Option(help="Budgets file; default: that of the suite.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Set each max to the run's value, and show the diff.")
    ] = False,
    missing: Annotated[
        MissingPolicy | None, typer.Option(help="Rows without a cell, cells without the number.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Run that rows with `baseline: true` grow from; or REVISION:FOLDER of one in git."
        ),
    ] = None,
    format_: Annotated[Format, typer.Option("--format")] = Format.text,
    output: Annotated[Path | None, typer.Option(help="Write there instead of to stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Hold RUN against its memory budgets.

    Where a bound on memory is exceeded, it names the buffers that grew since the
    run of --baseline, or of `updated_from` in the budgets file; without either,
    the largest buffers at the peak.

    Exits 0 if all are held, 1 if one is exceeded (a cell that ran out of memory
    exceeds it), 3 if a bounded cell failed, 4 if a row is for another
    environment, 5 if a row matches no cell or a number is missing.
    """
    from meftbench.plan.budgets import load_budgets
    from meftbench.records.store import load_run, warn_of_left_out
    from meftbench.report.render.verdicts import render_verdicts, verdicts_markdown
    from meftbench.report.views.not_run import not_run, to_go_on
    from meftbench.verdicts.budgets import budgets_file, file_to_update
    from meftbench.verdicts.explain import exceeded, explained
    from meftbench.verdicts.judge import exit_code, judge
    from meftbench.verdicts.revision import load_named
    from meftbench.verdicts.update import updated

    loaded = load_run(run)
    warn_of_left_out(loaded)
    if left := not_run(loaded):
        put_error(single_line(f"note: {left}, and not checked: `{to_go_on(loaded)}`"))
    budgets = load_budgets(budget or (file_to_update if update else budgets_file)(loaded))
    if update:
        change = updated(loaded, budgets)
        change.write()
        lines = [*filter(None, [change.diff().rstrip("\n")]), *map(single_line, change.kept)]
        emit(visible("\n".join(lines)) or "nothing to update", output)
        return
    baseline_run = load_named(baseline) if baseline else None
    verdicts = judge(loaded, budgets, baseline_run, missing.value if missing else None)
    if exceeded(verdicts):
        verdicts = explained(verdicts, loaded, baseline_run or _updated_from(budgets, loaded))
    emit(render_verdicts(verdicts, Format.json if as_json else format_, loaded.name), output)
    if format_ is Format.github:
        add_to_step_summary(verdicts_markdown(verdicts), f"Memory budgets of {loaded.name}")
    after = [("check", run, "--update")] if exceeded(verdicts) else []
    say_next(("show", run, "CELL"), *after, ("report", run), as_json=as_json or format_ is not Format.text)
    raise typer.Exit(exit_code(verdicts))


def _updated_from(budgets: Budgets, run: Run) -> Run | None:
    """The run that the budgets were updated from; None where they do not say, it is gone, or it is `run` itself.

    Raises UserError: it is there, and cannot be read.
    """
    from meftbench.records.store import SUITE, load_run

    folder = budgets.updated_from
    if folder is None or not (folder / SUITE).is_file():
        return None
    return None if folder.resolve() == run.path.resolve() else load_run(folder)
