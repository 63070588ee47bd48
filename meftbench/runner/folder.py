"""The run folder's beginning: a new one, or an earlier run taken up again."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import meftbench
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.plan.identity import uuid7
from meftbench.plan.suite import Suite, shipped_suites
from meftbench.records.record import Record
from meftbench.records.store import BUDGETS, ENVIRONMENT, LOCK, RECORDS, SUITE, Run, Writer, load_run

LOGS = "logs"
RUNS = Path("runs")


def default_folder(name: str, runs: Path = RUNS) -> Path:
    """runs/NAME-TIME, in UTC; a number is added where that is taken."""
    stem = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    taken = {path.name for path in runs.glob(f"{stem}*")}
    return runs / next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def latest_folder(suite: Suite, runs: Path = RUNS) -> Path:
    """The newest run of `suite` under `runs`. Raises UserError where there is none."""
    found = [file.parent for file in runs.glob(f"{suite.name}-*/{SUITE}")]
    for folder in sorted(found, key=lambda folder: (folder / SUITE).stat().st_mtime, reverse=True):
        if load_run(folder).suite.get("suite_id") == suite.suite_id:
            return folder
    raise UserError("--resume", f"no run of suite {suite.name!r} under {runs}/", "name its folder with --out")


def earlier_run(suite: Suite, out: Path, resume: bool) -> Run | None:
    """The run in `out` that is to be taken up; None where a new one begins there.

    Raises UserError: the folder holds something and `resume` is not set, it is not a run, or the run is of
    another suite or protocol (exit 4).
    """
    if not out.is_dir():
        if out.exists():
            raise UserError(str(out), "is a file", "name a folder with --out")
        return None
    if not (out / SUITE).exists() and _never_began(out):
        return None
    if not resume:
        cure = "add --resume to finish the run in it, or choose another --out"
        raise UserError(str(out), "is not empty", cure)
    run = load_run(out)
    for what, then, now in (
        ("protocol", run.suite.get("protocol"), suite.protocol.model_dump(mode="json")),
        ("suite", run.suite.get("cells"), described(suite)["cells"]),
    ):
        key, identity = f"{what}_id", suite.protocol.protocol_id if what == "protocol" else suite.suite_id
        if run.suite.get(key) != identity:
            difference = _difference(then, now)
            cure = "choose another --out for it, or run what began there"
            raise UserError(str(out), f"holds a run of another {what} ({difference})", cure, NOT_COMPARABLE)
    return run


def _never_began(folder: Path) -> bool:
    """Whether all it holds is what a run killed before its first cell leaves behind."""
    ours = {LOCK, LOGS, RECORDS, ENVIRONMENT, BUDGETS}
    names = {path.name for path in folder.iterdir()}
    records = folder / RECORDS
    empty = not records.exists() or records.stat().st_size == 0
    return empty and all(name in ours or name.startswith((f".{SUITE}.", f".{ENVIRONMENT}.")) for name in names)


def _difference(then: Any, now: Any) -> str:
    """The first thing in which two plans differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key) and key not in ("timeout", "repeats", "on_oom"):
                return f"{key} was {then.get(key)}, is {now.get(key)}"
    if isinstance(then, list) and isinstance(now, list):
        before, after = ({cell["label"]: cell["cell_id"] for cell in cells} for cells in (then, now))
        for label in after:
            if label not in before:
                return f"{label} is new"
        for label in before:
            if label not in after:
                return f"{label} is gone"
        return next((f"{label} has changed" for label in after if before[label] != after[label]), "other cells")
    return "it does not say which"


def begin(writer: Writer, suite: Suite, environment: dict[str, Any]) -> str:
    """Write environment.json, the budgets and, last, suite.yaml, with which the run exists; its run_id."""
    run_id = uuid7()
    writer.write(ENVIRONMENT, json.dumps(environment, indent=2, default=str) + "\n")
    if suite.budgets is not None:
        shutil.copyfile(suite.budgets, writer.folder / BUDGETS)
    content = {"schema": 1, "run_id": run_id} | described(suite)
    writer.write(SUITE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    return run_id


def described(suite: Suite) -> dict[str, Any]:
    """The resolved suite: the protocol in full, and every cell spelled out."""
    return {
        "suite_id": suite.suite_id,
        "protocol_id": suite.protocol.protocol_id,
        "name": suite.name,
        "description": suite.description,
        "meftbench_version": meftbench.__version__,
        "source": _source(suite.source),
        **({"command": suite.command} if suite.command else {}),
        "budgets": str(suite.budgets) if suite.budgets else None,
        "protocol": suite.protocol.model_dump(mode="json"),
        "cells": [
            {"cell_id": cell.cell_id, "label": cell.label, **cell.model_dump(mode="json")} for cell in suite.cells
        ],
    }


def _source(file: Path | None) -> str | None:
    """What `meftbench run` takes to run the suite again: the name of a shipped one, which is the same everywhere."""
    if file is None:
        return None
    shipped = shipped_suites().get(file.stem)
    return file.stem if shipped and shipped.resolve() == file.resolve() else str(file.resolve())


def continue_in(writer: Writer, run: Run, environment: dict[str, Any]) -> str | None:
    """Take up `run`; a sentence where the machine or the software is not the one it began with.

    The first environment stays in environment.json; another is kept beside it, under the id its records carry.
    """
    now, then = environment["environment_id"], run.environment.get("environment_id")
    if now == then:
        return None
    writer.write(f"environment-{now}.json", json.dumps(environment, indent=2, default=str) + "\n")
    difference = _difference(run.environment.get("comparable"), environment["comparable"])
    return f"the run began in another environment ({difference}); its records are marked by environment_id"


def finished_records(run: Run | None, retry: frozenset[str]) -> dict[tuple[str, int], Record]:
    """The records that stand: those whose status is not to be tried again."""
    if run is None:
        return {}
    return {(r.cell_id, r.repeat): r for r in run.records if r.status not in retry}
