"""Begins a run in its folder, or resumes the earlier run that is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import meftbench
from meftbench.documents import WRITTEN_BYTES, bytes_of
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.plan.identity import uuid7
from meftbench.plan.suite import Suite, shipped_suites
from meftbench.records.record import Record
from meftbench.records.store import BUDGETS, ENVIRONMENT, LOCK, RECORDS, SUITE, Run, environment_in, load_run
from meftbench.records.suite_text import suite_text
from meftbench.records.writer import Writer

LOGS = "logs"
RUNS = Path("runs")


def default_folder(name: str, runs: Path = RUNS) -> Path:
    """runs/NAME-TIME, in UTC; a number is added where that folder exists."""
    stem = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    existing = {path.name for path in runs.glob(f"{stem}*")}
    return runs / next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(existing) + 3))) if n not in existing)


def latest_folder(suite: Suite, runs: Path = RUNS) -> Path:
    """The newest run of `suite` under `runs` that can be resumed: of its protocol, and without cells that it lacks.

    Raises UserError where there is none.
    """
    folders = [file.parent for file in runs.glob(f"{suite.name}-*/{SUITE}")]
    for folder in sorted(folders, key=lambda folder: (folder / SUITE).stat().st_mtime, reverse=True):
        run = load_run(folder)
        of_its_protocol = run.suite.get("protocol_id") == suite.protocol.protocol_id
        if run.suite.get("cells") and of_its_protocol and not _missing_cells(run, suite):
            return folder
    raise UserError("--resume", f"no run of suite {suite.name!r} under {runs}/", "name its folder with --out")


def earlier_run(suite: Suite, out: Path, resume: bool) -> Run | None:
    """The run in `out` that is to be resumed; None where a new one begins there.

    A suite to which cells were added since can be resumed, and the run gets the new cells.

    Raises UserError: the folder holds something and `resume` is not set, it is not a run, or the run is of
    another protocol, or of a suite with a cell that this one lacks (exit 4).
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
    if not isinstance(run.suite.get("cells"), list):
        raise UserError(str(out / SUITE), "lists no cells: it is damaged", "choose another --out, and run again")
    cure = "choose another --out for it, or run what began there"
    if run.suite.get("protocol_id") != suite.protocol.protocol_id:
        difference = _difference(run.suite.get("protocol"), suite.protocol.model_dump(mode="json"))
        raise UserError(str(out), f"holds a run of another protocol ({difference})", cure, NOT_COMPARABLE)
    if missing := _missing_cells(run, suite):
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        what = f"holds a run of another suite ({missing[0]}{more} not in this one)"
        raise UserError(str(out), what, cure, NOT_COMPARABLE)
    return run


def _missing_cells(run: Run, suite: Suite) -> list[str]:
    """The labels of the cells of `run` that `suite` lacks."""
    cell_ids = {cell.cell_id for cell in suite.cells}
    return [str(cell["label"]) for cell in run.suite["cells"] if cell["cell_id"] not in cell_ids]


@contextmanager
def gone_unless_begun(out: Path) -> Iterator[None]:
    """Remove the folder `out` again if it was made in this context and a UserError ended the run before it began."""
    existed = out.exists()
    try:
        yield
    except UserError:
        there = out.is_dir() and not out.is_symlink()  # by which another program may have replaced it
        if not existed and there and not (out / SUITE).exists() and _never_began(out):
            shutil.rmtree(out)
        raise


def _never_began(folder: Path) -> bool:
    """Whether the folder holds only what a run that was killed before its first cell leaves behind."""
    ours = {LOCK, LOGS, RECORDS, ENVIRONMENT, BUDGETS}
    names = {path.name for path in folder.iterdir()}
    records = folder / RECORDS
    empty = not records.exists() or records.stat().st_size == 0
    return empty and all(name in ours or name.startswith((f".{SUITE}.", f".{ENVIRONMENT}.")) for name in names)


def _difference(then: Any, now: Any) -> str:
    """The first key in which two mappings differ, with both values; settings that do not matter are skipped."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key) and key not in ("timeout", "repeats", "on_oom"):
                return f"{key} was {then.get(key)}, is {now.get(key)}"
    return "it does not say which"


# Of functions of the user's own code, by name.
Digests = Mapping[str, str | None]


def begin(writer: Writer, suite: Suite, environment: dict[str, Any], code: Digests) -> str:
    """Write environment.json, the budgets and, last, suite.yaml, from which on the folder is a run. Returns its run_id.

    code: digests of the user's own functions that the suite names.
    """
    run_id = uuid7()
    writer.write(ENVIRONMENT, json.dumps(environment, indent=2, default=str) + "\n")
    _write_suite(writer, suite, run_id, code)
    return run_id


def _write_suite(writer: Writer, suite: Suite, run_id: str, code: Digests) -> None:
    if suite.budgets is not None:
        writer.write(BUDGETS, bytes_of(suite.budgets, WRITTEN_BYTES, "see to that file"))
    content = {"schema": 1, "run_id": run_id} | described(suite) | ({"own_code": dict(code)} if code else {})
    writer.write(SUITE, suite_text(content))


def described(suite: Suite) -> dict[str, Any]:
    """The resolved suite, as suite.yaml has it: the protocol in full, and every cell with all its fields."""
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
    """What `meftbench run` takes to run the suite again, in the folder in which it ran: its name if it is a shipped one
    or one of ./suites, else its path from there. Of a file elsewhere only the name, since pages show it, and a folder
    of this machine says nothing to their readers."""
    if file is None:
        return None
    shipped = shipped_suites().get(file.stem)
    if shipped and shipped.resolve() == file.resolve():
        return file.stem
    if not file.resolve().is_relative_to(Path.cwd()):
        return file.name
    within = file.resolve().relative_to(Path.cwd())
    return file.stem if within == Path("suites", f"{file.stem}.yaml") else str(within)


def continue_in(writer: Writer, run: Run, suite: Suite, environment: dict[str, Any], code: Digests) -> list[str]:
    """Resume `run`. Returns sentences on what has changed: added cells, the environment, the user's own code.

    The first environment stays in environment.json; another is written beside it, under the id that its records have.
    """
    notes = []
    before = dict(run.suite.get("own_code") or {})
    changed = [name for name, digest in code.items() if name in before and before[name] != digest]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        notes.append(
            f"the code of {changed[0]}{more} is another than when the run began; records are marked by own_code"
        )
    if added := len(suite.cells) - len(run.suite["cells"]):
        _write_suite(writer, suite, run.run_id, {**code, **before})
        notes.append(f"the suite has {added} more {'cell' if added == 1 else 'cells'} than the run began with")
    now, then = environment["environment_id"], run.environment.get("environment_id")
    if now != then:
        add_environment(writer, environment)
        difference = _difference(run.environment.get("comparable"), environment["comparable"])
        notes.append(f"the run began in another environment ({difference}); its records are marked by environment_id")
    return notes


def add_environment(writer: Writer, environment: Mapping[str, Any]) -> None:
    """Write an environment of records of the run beside its first one, under its id, unless the folder has it."""
    environment_id = environment["environment_id"]
    file = writer.folder / f"environment-{environment_id}.json"
    if not file.exists() and environment_in(writer.folder / ENVIRONMENT).get("environment_id") != environment_id:
        writer.write(file.name, json.dumps(environment, indent=2, default=str) + "\n")


def finished_records(run: Run | None, retry: frozenset[str], chosen: Collection[str]) -> dict[tuple[str, int], Record]:
    """The records that are kept, by (cell_id, repeat).

    Not kept are those of the cells `chosen` (cell_ids) whose status is in `retry`, and those of cells that were skipped
    because of a cell that is not out of memory any more, or is tried again: they are judged anew.
    """
    if run is None:
        return {}
    kept = [r for r in run.records if r.status not in retry or r.cell_id not in chosen]
    standing = {None, *(r.cell_id for r in kept if r.status == "oom")}
    return {(r.cell_id, r.repeat): r for r in kept if _cause(r) in standing}


def _cause(record: Record) -> str | None:
    """The cell_id of the cell that was out of memory and because of which this one was skipped; None: it was not."""
    return record.status_detail.get("dominated_by") if record.status == "skipped" else None
