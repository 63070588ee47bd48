"""The files of a report: the page, its plots, and the tables as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from meftbench.records.store import Run, unwritable, write_whole
from meftbench.report.figures.pictures import pictures
from meftbench.report.render.html import page
from meftbench.report.render.markdown import markdown
from meftbench.report.results import frame_of, run_names, write_csv
from meftbench.report.views.validation import validation_pictures

PAGE, TABLE, MARKDOWN, PLOTS = "report.html", "table.csv", "table.md", "plots"


def write_report(runs: Sequence[Run], folder: Path, kinds: AbstractSet[str]) -> list[Path]:
    """Write the `kinds` ("html", "md", "csv") of report on `runs` into `folder`; return the files, the page first.

    Raises UserError where the folder cannot be written.
    """
    frame = frame_of(runs)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "html" in kinds:
            drawn = [*pictures(frame), *validation_pictures(runs, run_names(runs))]
            (folder / PLOTS).mkdir(exist_ok=True)
            for picture in drawn:
                picture.write(folder / PLOTS)
            write_whole(folder / PAGE, page(runs, frame, drawn) + "\n")
            written.append(folder / PAGE)
            written += [folder / PLOTS / f"{picture.name}.{kind}" for picture in drawn for kind in ("png", "svg")]
        if "csv" in kinds:
            write_csv(frame, folder / TABLE)
            written.append(folder / TABLE)
        if "md" in kinds:
            write_whole(folder / MARKDOWN, markdown(runs, frame))
            written.append(folder / MARKDOWN)
    except OSError as fault:
        raise unwritable(folder, fault) from None
    return written
