"""`meftbench show`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from meftbench.cli.options import RunFolder, say_next
from meftbench.escapes import json_text


def show(
    run: RunFolder,
    cell: Annotated[str | None, typer.Argument(help="Start of a cell_id, or a glob on the label.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="With the traceback of a cell that failed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The records as JSON, one a line.")] = False,
) -> None:
    """Show the table of RUN, or everything about one CELL of it."""
    from meftbench.records.store import load_run, warn_if_torn
    from meftbench.report.render.terminal import print_summary
    from meftbench.report.views.detail import find_records, print_records

    loaded = load_run(run)
    warn_if_torn(loaded)
    if as_json:
        records = find_records(loaded, cell) if cell else loaded.records
        print("\n".join(json_text(json.dumps(record.to_json(), ensure_ascii=False)) for record in records))
    elif cell:
        found = find_records(loaded, cell)
        print_records(loaded, found, traceback)
        failed = not traceback and any("traceback" in record.status_detail for record in found)
        say_next(*([("show", run, cell, "--traceback")] if failed else []), ("show", run), ("report", run))
    else:
        print_summary(loaded)
        say_next(("report", run), ("show", run, "CELL"), ("compare", run, "OTHER_RUN"))
