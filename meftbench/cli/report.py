"""`meftbench report`."""

from __future__ import annotations

import sys
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meftbench.cli import completion


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
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write the page (report.html), the plots (plots/*.png, *.svg) and the table (table.csv, table.md) of RUN...

    Several runs go into one page, side by side.
    """
    from meftbench.records.store import load_run, warn_if_torn
    from meftbench.report.render.report import write_report

    loaded = [load_run(run) for run in runs]
    for run in loaded:
        warn_if_torn(run)
    kinds = {"html", "md", "csv"} if format_ is Format.all else {format_.value}
    written = write_report(loaded, out or runs[0], kinds)
    for file in written:
        print(file)
    if open_ and not webbrowser.open(written[0].resolve().as_uri()):
        print(f"no browser to open {written[0]} with", file=sys.stderr)
