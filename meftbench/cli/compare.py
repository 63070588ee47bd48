"""`meftbench compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meftbench.cli import completion
from meftbench.cli.options import add_to_step_summary, emit, say_next
from meftbench.errors import UserError

if TYPE_CHECKING:
    from meftbench.records.store import Run


class Format(StrEnum):
    text = "text"
    json = "json"
    github = "github"
    markdown = "markdown"


class FailOn(StrEnum):
    regression = "regression"


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, or REVISION:FOLDER of a run in git. The first is the one before.",
            autocompletion=completion.runs,
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Before: what this commit, branch or tag has in RUN's place.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Only this metric; may be repeated.")] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Smaller changes count as none: 2% or 0.02. Default: 0; measured 1%.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also print numbers that are the same or within noise.")] = False,
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Leave out what is the same: the default, but for JSON.")
    ] = False,
    across: Annotated[
        bool, typer.Option("--across", help="Also numbers measured in other environments or on other CPU threads.")
    ] = False,
    fail_on: Annotated[FailOn | None, typer.Option(help="Exit 1 on this.")] = None,
    format_: Annotated[Format, typer.Option("--format")] = Format.text,
    output: Annotated[Path | None, typer.Option(help="Write there instead of to stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """What changed from the first RUN to each other one, and which buffers grew.

    compare A B: two runs. With more, each is a column against the first.
    compare RUN --against HEAD~3: as it was committed, and as it is now.
    compare HEAD~3:RUN RUN: the same, with the revision spelled out.

    Counted bytes are compared exactly, on whatever machines; measured values
    only within one environment, and times only on as many CPU threads and beyond
    their own noise: by the Mann-Whitney U test of their samples and the bootstrap
    interval of the ratio of medians (scipy), else where quartiles are apart.
    Exits 4 where the runs are not comparable, 5 without a common cell.
    """
    from meftbench.records.store import warn_of_left_out
    from meftbench.report.render.comparisons import comparison_markdown, comparisons
    from meftbench.verdicts.compare import compare as compared
    from meftbench.verdicts.compare import exit_code

    share = _share(threshold)
    if all_ and only_changed:
        raise UserError("--all, --only-changed", "exclude each other", "name one of them")
    first, *others = _loaded(runs, against)
    for run in (first, *others):
        warn_of_left_out(run)
    results = [compared(first, other, metric or (), share, across=across) for other in others]
    chosen = Format.json if as_json else format_
    unchanged = all_ or (chosen is Format.json and not only_changed)
    emit(comparisons(chosen, results, unchanged), output)
    if format_ is Format.github:
        for result in results:
            add_to_step_summary(comparison_markdown(result), f"{result.first} and {result.second}")
    folders = [name for name in runs if Path(name).is_dir()]
    say_next(*([("report", *folders)] if folders else []), as_json=as_json or format_ is not Format.text)
    raise typer.Exit(max(exit_code(result, fail_on is FailOn.regression) for result in results))


def _loaded(names: list[str], against: str | None) -> list[Run]:
    """The runs to compare, the one before first. Raises UserError: one cannot be read, or fewer than two are named."""
    from meftbench.verdicts.revision import load_named, load_run_at

    if against is None:
        if len(names) < 2:
            raise UserError("compare", "only one run is named", "name another, or a revision with --against")
        return [load_named(name) for name in names]
    if len(names) > 1:
        raise UserError("--against", f"{len(names)} runs are named", "name one run, or leave --against out")
    # The run of the checkout is read first, since a mistyped name is more likely than a missing commit.
    now = load_named(names[0])
    return [load_run_at(against, now.path), now]


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
