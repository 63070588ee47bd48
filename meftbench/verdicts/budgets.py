"""Which budgets file a run is held against, and which one `check --update` may write."""

from __future__ import annotations

import os
from pathlib import Path

from meftbench.documents import guarded
from meftbench.errors import UserError
from meftbench.records.store import BUDGETS, Run


def budgets_file(run: Run, cure: str = "name a file with --budget") -> Path:
    """The budgets file that the suite names, if it still exists, else the copy of it in the run folder.

    The file itself comes first, since annotations name it and --update has to change it.
    cure: for the message where there is neither, which raises UserError.
    """
    path = run.suite.get("budgets")
    with guarded(str(run.path)):
        named_is_there = bool(path) and Path(str(path)).is_file()
    if named_is_there:
        return Path(os.path.relpath(str(path))) if Path(str(path)).is_relative_to(Path.cwd()) else Path(str(path))
    if (run.path / BUDGETS).is_file():
        return run.path / BUDGETS
    raise UserError(str(run.path), "its suite names no budgets", cure)


def file_to_update(run: Run) -> Path:
    """The file of `budgets_file`, to be written. A run folder may come from anybody, so neither what its suite names
    nor a link in it decides that files elsewhere are written: the copy in the run folder is, and what lies below the
    working folder.

    Raises UserError: there is no budgets file, or it lies elsewhere.
    """
    file = budgets_file(run)
    with guarded(str(file)):
        place, copy = file.resolve(), run.path.resolve() / BUDGETS
        in_run = file == run.path / BUDGETS
        allowed = place == copy if in_run else place.is_relative_to(Path.cwd().resolve())
    if allowed:
        return file
    what = "is a link" if in_run else "is named by the suite of the run, and does not lie below the working folder"
    raise UserError(str(file), what, "to change that file, name it with --budget")
