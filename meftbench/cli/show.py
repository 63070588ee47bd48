"""`meftbench show`."""

from __future__ import annotations

from typing import Annotated

import typer

from meftbench.cli.options import RunFolder, say_next
from meftbench.cli.output import put, put_error, put_json


def show(
    run: RunFolder,
    cell: Annotated[
        str | None,
        typer.Argument(
            help="A label, with or without its model; a method; a cell_id or its start; or a glob on labels."
        ),
    ] = None,
    cells: Annotated[bool, typer.Option("--cells", help="List cell_id, status and label of each cell.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="With the traceback of a cell that failed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The records as JSON, one a line.")] = False,
) -> None:
    """Show the table of RUN, or everything about one CELL of it.

    show RUN lora+checkpoint/b4/s64: the cell of that method and shape.
    show RUN lora+checkpoint: the method's cell, or a list where it has several.
    show RUN '*/lora*': all cells whose label is like that.

    Exits 5 where RUN has no such cell, has several, or no cell has finished.
    """
    from meftbench.records.outcome import collect
    from meftbench.records.store import load_run, warn_of_left_out
    from meftbench.report.render.terminal import print_summary
    from meftbench.report.views.cells import facts_of, find_records, lines_of, refuse_empty, several
    from meftbench.report.views.detail import print_records

    loaded = load_run(run)
    warn_of_left_out(loaded)
    refuse_empty(loaded)
    records = find_records(loaded, cell) if cell else loaded.records
    if cells:
        listed = collect(records)
        if as_json:
            for one in listed:
                put_json(facts_of(one))
        else:
            put(*lines_of(listed))
        return
    if cell and (choice := several(loaded, cell, records)):
        lines, error = choice
        put_error(*lines)
        raise error
    if as_json:
        for record in records:
            put_json(record.to_json())
    elif cell:
        print_records(loaded, records, traceback)
        failed = not traceback and any("traceback" in record.status_detail for record in records)
        say_next(*([("show", run, cell, "--traceback")] if failed else []), ("show", run), ("report", run))
    else:
        print_summary(loaded)
        say_next(("report", run), ("show", run, "--cells"), ("show", run, "CELL"), ("compare", run, "OTHER_RUN"))
