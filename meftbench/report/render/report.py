"""The files of a report: the page, its plots, and the tables as CSV and Markdown."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

from meftbench.errors import NOTHING_MATCHED, UserError
from meftbench.records.store import Run, subfolder, unwritable, write_whole
from meftbench.report.figures.picture import Picture
from meftbench.report.figures.pictures import pictures
from meftbench.report.render.html import page
from meftbench.report.render.markdown import markdown
from meftbench.report.results import frame_of, run_names, write_csv
from meftbench.report.views.validation import validation_pictures

PAGE, TABLE, MARKDOWN, PLOTS = "report.html", "table.csv", "table.md", "plots"


def plots(runs: Run | Sequence[Run]) -> dict[str, Picture]:
    """The plots of one run or several, by name; each is drawn when its `figure` is asked for.

    A plot has `figure`, of matplotlib, and `data`, the frame of the numbers that it shows, in bytes and seconds, with
    their sources. A notebook shows it as a picture.
    """
    listed = [runs] if isinstance(runs, Run) else list(runs)
    drawn = [*pictures(frame_of(listed)), *validation_pictures(listed, run_names(listed))]
    return {picture.name: picture for picture in drawn}


def write_plots(runs: Sequence[Run], folder: Path, names: Sequence[str]) -> list[Path]:
    """Write the plots of these names as PNG and SVG, and the numbers behind each as CSV; return the files.

    Raises UserError: the runs have no plot of a name (exit 5), or the folder cannot be written.
    """
    found = plots(runs)
    for name in names:
        if name not in found:
            where = ", ".join(str(run.path) for run in runs)
            cure = f"it has {', '.join(found)}" if found else "no cell has numbers to plot"
            raise UserError(where, f"no plot {name!r}", cure, NOTHING_MATCHED)
    written = []
    with _writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(names):
            found[name].write(folder)
            written += [folder / f"{name}.png", folder / f"{name}.svg"]
            data = found[name].data
            if data is not None:
                write_csv(data, folder / f"{name}.csv")
                written.append(folder / f"{name}.csv")
    return written


@contextmanager
def _writing_into(*folders: Path) -> Iterator[None]:
    """Raise UserError in place of an OSError. Of the `folders`, the outermost first, those that were made in vain, as
    nothing could be written into them, are removed again."""
    before = [folder for folder in folders if folder.exists()]
    try:
        yield
    except (OSError, UserError) as fault:
        for folder in reversed(folders):
            if folder not in before and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(fault, OSError):
            raise unwritable(folders[0], fault) from None
        raise


MANY = 2000  # cells from which on pictures are drawn beside the rest, which takes as long
_PATIENCE_S = 300


def _drawing(drawn: Sequence[Picture], folder: Path, cells: int) -> Callable[[], Sequence[Picture]]:
    """Write the pictures into `folder`. Returns a function that gives them when they are there: of many cells, they are
    drawn in a process beside this one, where processes can be forked."""

    def draw() -> Sequence[Picture]:
        for picture in drawn:
            picture.write(folder)
        return drawn

    if cells < MANY or sys.platform != "linux":
        return draw
    beside = multiprocessing.get_context("fork").Process(target=draw, daemon=True)
    beside.start()

    def drawn_beside() -> Sequence[Picture]:
        beside.join(_PATIENCE_S)
        if beside.exitcode != 0:  # whatever went wrong there is said, or goes well, here
            beside.kill()
            return draw()
        for picture in drawn:
            picture.is_drawn_as((folder / f"{picture.name}.png").read_bytes())
        return drawn

    return drawn_beside


def write_report(runs: Sequence[Run], folder: Path, kinds: AbstractSet[str]) -> list[Path]:
    """Write the `kinds` ("html", "md", "csv") of report on `runs` into `folder`; return the files, the page first.

    Raises UserError where the folder cannot be written.
    """
    frame = frame_of(runs)
    written: list[Path] = []
    with _writing_into(folder, folder / PLOTS):
        folder.mkdir(parents=True, exist_ok=True)
        if "html" in kinds:
            drawn = [*pictures(frame), *validation_pictures(runs, run_names(runs))]
            plots_folder = subfolder(folder, PLOTS)
            write_whole(folder / PAGE, page(runs, frame, _drawing(drawn, plots_folder, len(frame))) + "\n")
            written.append(folder / PAGE)
            written += [folder / PLOTS / f"{picture.name}.{kind}" for picture in drawn for kind in ("png", "svg")]
        if "csv" in kinds:
            write_csv(frame, folder / TABLE)
            written.append(folder / TABLE)
        if "md" in kinds:
            write_whole(folder / MARKDOWN, markdown(runs, frame))
            written.append(folder / MARKDOWN)
    return written
