"""Reads the data of trainings before a run begins, so that unusable data end it early, and checks that a run that is
resumed, or has several machines, has the same data throughout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from meftbench.catalogue.tasks import is_own
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.identity import place
from meftbench.plan.training import DATA_VARIABLE
from meftbench.records.store import Run

CHECK = (sys.executable, "-m", "meftbench.tasks.check")
DATA_SECONDS = 3600.0  # large data take long to read
# The settings of a training that decide which data are read, and from where.
_READ_BY = ("task", "data", "train_examples", "evaluation_examples")


def read_data(cells: Iterable[Cell], check: tuple[str, ...] = CHECK) -> dict[str, dict[str, Any]]:
    """Read the data of all trainings among `cells`, each once, in another process: this one never loads `datasets`.

    Data of the Hugging Face hub are not read here but by the cells, which may have to wait for the hub.
    Returns, by the settings that decide which rows are read, a "task" with its "digest", or with an "error" (arguments
    of a UserError).
    """
    requests: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.training and _is_local(cell):
            requests.setdefault(_data_key(cell.training.model_dump()), {n: getattr(cell.training, n) for n in _READ_BY})
    if not requests:
        return {}
    answers = zip(requests.items(), _answers(list(requests.values()), check), strict=True)
    return {key: {"task": request["task"]} | answer for (key, request), answer in answers}


def check_data(answers: Mapping[str, Mapping[str, dict[str, Any]]], earlier: Run | None) -> None:
    """Check what `read_data` found, by the name of the machine on which it ran; "" for this one.

    Raises UserError: data that cannot be used (exit 2); data that differ between machines, or have changed since the
    records of `earlier` (exit 4).
    """
    recorded_digests = _digests(earlier)
    first: dict[str, tuple[str, str]] = {}  # by key: the digest, and the machine on which it was found first
    for machine, found in answers.items():
        for key, answer in found.items():
            if "error" in answer:
                where, what, cure = answer["error"]
                raise UserError(f"{machine}: {where}" if machine else where, what, cure)
            digest, other = first.setdefault(key, (answer["digest"], machine))
            if answer["digest"] != digest:
                what = f"the data of task {answer['task']!r} are others on {machine} than on {other}"
                raise UserError("data", what, "copy those of one machine to all", NOT_COMPARABLE)
            if recorded_digests.get(key, digest) != digest:
                what = f"the data of task {answer['task']!r} have changed since its records were made"
                cure = "restore them, or choose another --out"
                raise UserError(str(earlier.path) if earlier else "", what, cure, NOT_COMPARABLE)


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Of trainings that read the same data, the first."""
    return list({json.dumps([getattr(c.training, n) for n in _READ_BY]): c for c in cells if c.training}.values())


def _is_local(cell: Cell) -> bool:
    """Whether the data are files on this machine, in a folder of the user's or in a data root; tasks/sources.py decides
    in the same way."""
    assert cell.training is not None
    return bool(cell.training.data or os.environ.get(DATA_VARIABLE)) or os.path.isdir(cell.training.task)


def _data_key(training: dict[str, Any]) -> str:
    """The settings that decide which rows are read, as text. The data folder is not among them: data may be moved."""
    task = str(training["task"])
    limits = [training.get(name) for name in ("train_examples", "evaluation_examples")]
    return json.dumps([place(task) if is_own(task) else task, *limits])


def _digests(earlier: Run | None) -> dict[str, str]:
    """Digests of the rows that the recorded trainings of `earlier` read, by `_data_key`."""
    digests = {}
    for record in earlier.records if earlier else ():
        if record.cell.get("training") and record.cell.get("data_digest"):
            digests[_data_key(record.cell["training"])] = str(record.cell["data_digest"])
    return digests


def _answers(requests: list[dict[str, Any]], check: tuple[str, ...]) -> list[dict[str, Any]]:
    """What the process `check` found out: for each request a "digest", or an "error" (arguments of a UserError)."""
    try:
        done = subprocess.run(
            check, input=json.dumps(requests), capture_output=True, text=True, timeout=DATA_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        what = f"the process that reads them has not ended in {DATA_SECONDS / 60:g} minutes"
        cure = "see that their disk answers, and use fewer or smaller files"
        raise UserError("data", what, cure) from None
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        message = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError("data", f"the process that reads them failed ({message})", "read its message") from None
    return answers
