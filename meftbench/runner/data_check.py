"""The data of trainings, read before a run begins: what is wrong with them, and whether a run that is taken up still
has the data that it began with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from meftbench.catalogue.tasks import is_own
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.identity import place
from meftbench.plan.training import DATA_VARIABLE
from meftbench.records.store import Run

CHECK = (sys.executable, "-m", "meftbench.tasks.check")
_READ_BY = ("task", "data", "train_examples", "evaluation_examples")


def check_data(cells: Iterable[Cell], earlier: Run | None, check: tuple[str, ...] = CHECK) -> None:
    """Read the data of all trainings among `cells`, each once, in a process of its own: nothing here loads `datasets`.

    Data of the hub are left to the cells, which may have to wait for it.

    Raises UserError: data that cannot be used (exit 2); data that are not those of the records of `earlier` (exit 4).
    """
    asked: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.training and _lies_here(cell):
            asked.setdefault(_reading(cell.training.model_dump()), {n: getattr(cell.training, n) for n in _READ_BY})
    if not asked:
        return
    before = _digests(earlier)
    for key, found in zip(asked, _read(list(asked.values()), check), strict=True):
        if "error" in found:
            raise UserError(*found["error"])
        if before.get(key, found["digest"]) != found["digest"]:
            what = f"the data of task {asked[key]['task']!r} have changed since its records were made"
            cure = "restore them, or choose another --out"
            raise UserError(str(earlier.path) if earlier else "", what, cure, NOT_COMPARABLE)


def _lies_here(cell: Cell) -> bool:
    """Whether the data are files on this machine, as tasks/sources.py decides: a folder of the user's, or a
    data root."""
    assert cell.training is not None
    return bool(cell.training.data or os.environ.get(DATA_VARIABLE)) or os.path.isdir(cell.training.task)


def _reading(training: dict[str, Any]) -> str:
    """What decides which rows are read. Where they lie does not: data may be moved."""
    task = str(training["task"])
    limits = [training.get(name) for name in ("train_examples", "evaluation_examples")]
    return json.dumps([place(task) if is_own(task) else task, *limits])


def _digests(earlier: Run | None) -> dict[str, str]:
    """The digest of the rows that finished trainings read."""
    found = {}
    for record in earlier.records if earlier else ():
        if record.cell.get("training") and record.cell.get("data_digest"):
            found[_reading(record.cell["training"])] = str(record.cell["data_digest"])
    return found


def _read(asked: list[dict[str, Any]], check: tuple[str, ...]) -> list[dict[str, Any]]:
    done = subprocess.run(check, input=json.dumps(asked), capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError("data", f"the process that reads them failed ({words})", "read its message") from None
    return found
