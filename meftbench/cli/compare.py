"""`meftbench compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meftbench.cli.options import emit
from meftbench.errors import UserError


class Format(StrEnum):
    text = "text"
    json = "json"
    github = "github"
    markdown = "markdown"


class FailOn(StrEnum):
    regression = "regression"


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run before.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run after.")],
    metric: Annotated[list[str] | None, typer.Option(help="Only this metric; may be repeated.")] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Smaller changes count as none: 2% or 0.02. Default: 0; measured 1%.")
    ] = None,
    only_changed: Annotated[bool, typer.Option("--only-changed", help="Leave out what is the same.")] = False,
    across: Annotated[
        bool, typer.Option("--across", help="Also numbers measured in other environments or on other CPU threads.")
    ] = False,
    fail_on: Annotated[FailOn | None, typer.Option(help="Exit 1 on this.")] = None,
    format_: Annotated[Format, typer.Option("--format")] = Format.text,
    output: Annotated[Path | None, typer.Option(help="Write there instead of to stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """What changed from RUN_A to RUN_B, cell by cell.

    Counted bytes are compared exactly, on whatever machines; measured values only within one environment, and times
    only on as many CPU threads and beyond their own noise (quartiles apart). Exits 4 where the two are not comparable,
    5 without a common cell.
    """
    from meftbench.records.store import load_run, warn_if_torn
    from meftbench.report.render.verdicts import COMPARISON_FORMATS, append_step_summary, comparison_markdown
    from meftbench.verdicts.compare import compare as compared
    from meftbench.verdicts.compare import exit_code

    runs = [load_run(run_a), load_run(run_b)]
    for run in runs:
        warn_if_torn(run)
    comparison = compared(runs[0], runs[1], metric or (), _share(threshold), across=across)
    emit(COMPARISON_FORMATS[Format.json if as_json else format_](comparison, only_changed), output)
    if format_ is Format.github:
        append_step_summary(comparison_markdown(comparison, True), f"{run_a} and {run_b}")
    raise typer.Exit(exit_code(comparison, fail_on is FailOn.regression))


def _share(text: str | None) -> float | None:
    """A share from "2%" or "0.02"; None for None. Raises UserError: it is not a share."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise UserError("--threshold", f"{text!r} is not a share", "write 2% or 0.02")
    return share
