"""`meftbench report`."""

from __future__ import annotations

import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meftbench.cli import completion
from meftbench.cli.options import AsJson, say_next, say_written
from meftbench.cli.output import put, put_error
from meftbench.errors import NOTHING_MATCHED
from meftbench.escapes import path_text


class Format(StrEnum):
    html = "html"
    md = "md"
    csv = "csv"
    all = "all"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders that `meftbench run` wrote.", autocompletion=completion.runs),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: the first RUN.")] = None,
    format_: Annotated[Format, typer.Option("--format")] = Format.all,
    plot: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this plot, with its numbers as CSV; may be repeated.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the page (report.html), the plots (plots/*.png, *.svg) and the table (table.csv, table.md) of RUN...

    Several runs go into one page, side by side. The name of a plot is that of its file in plots/.
    Exits 5 where no cell of any RUN has finished; the page then says so.
    """
    from meftbench.records.store import BUDGETS, load_run, refuse_link, warn_of_left_out
    from meftbench.report.render.report import PLOTS, write_plots, write_report

    loaded = [load_run(run) for run in runs]
    for run in loaded:
        warn_of_left_out(run)
    folder = out or runs[0]
    if plot:
        refuse_link(folder / PLOTS)
        files = write_plots(loaded, folder / PLOTS, plot)
        say_written(files, as_json, lambda: put(*map(path_text, files)))
        return
    kinds = {"html", "md", "csv"} if format_ is Format.all else {format_.value}
    written = write_report(loaded, folder, kinds)
    say_written(written, as_json, lambda: put(*map(path_text, written)))
    if open_ and not webbrowser.open(written[0].resolve().as_uri()):
        put_error(f"no browser to open {path_text(written[0])} with")
    commands: list[tuple[str | Path, ...]] = [("compare", *runs)] if len(runs) > 1 else []
    commands += [("check", runs[0])] if (runs[0] / BUDGETS).is_file() else []
    empty = [run for run in loaded if not run.records]
    for run in empty:
        put_error(f"{path_text(run.path)}: no cell has finished, so that its page is empty")
    if len(empty) == len(loaded):
        raise typer.Exit(NOTHING_MATCHED)
    say_next(*commands, ("show", runs[0], "CELL"), as_json=as_json)
