"""kill -9 at random moments: whether a run that is resumed afterwards has lost, repeated, torn or left anything.

    python reports/campaigns/kills.py reports/kills --kills 1000          # half an hour on two cores

A run is begun in a process of its own. Again and again, after a random number of records and a random time more, its
worker server or one of its cells is killed, until its runner is killed, too, or ends; then the run is resumed, until
all its cells have ended. Most runs have cells of a stand-in that loads no torch; every REAL_EVERY-th run measures cells
of real, tiny models. Cells run one or two at a time.

Whenever a runner has ended are counted:
    lost       records that were on the disk before the kill and are not there, unchanged, after it; cells without a
               record in a run that says it has ended
    repeated   records of a cell that has one already
    torn       files of the run that cannot be read as a whole, and temporary files in a run that has ended
    left       processes that the run had started and that still run when it has ended
    surprises  runners that end in another way than they should, such as with a traceback

Writes kills.csv with a row a kill, environment.json, and summary.md, which is also printed. Exits 1 where a count is
not 0. It may be interrupted and called again: kills in kills.csv are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from meftbench.errors import DONE, INVALID, OVER_BUDGET, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite
from meftbench.records.record import Record
from meftbench.records.store import RECORDS, load_run, made, read_records, write_whole
from meftbench.report.render.verdicts import markdown_table
from meftbench.runner import gpus, run_suite
from meftbench.runner.environment import environment

TESTS = Path(__file__).resolve().parents[2] / "tests"
MARK = "MEFTBENCH_KILLED_RUN"  # variable: marks all processes of a run, whoever their parent is
REAL_EVERY = 12  # one run of so many measures real models: each takes a quarter of a minute, mostly to import torch
ENDING_SECONDS = 60.0  # within which the processes of a run whose runner was killed have to end by themselves
VICTIMS = ("runner", "worker", "cell")
RUN_FILES = {RECORDS, "suite.yaml", "environment.json", ".lock", "logs"}


# --- what is run ---


@dataclass(frozen=True)
class Load:
    """Cells to run and the worker that runs them.

    start_s, cell_s: seconds that a worker takes to start, and a cell to end, about: the span of random moments.
    most_between: records that are written between two kills, at most.
    """

    suite: Suite
    command: tuple[str, ...] | None
    start_s: float
    cell_s: float
    most_between: int


def stand_in() -> Load:
    """48 cells that sleep for 10 ms, measured by tests/stand_in.py."""
    brief = 1  # the seed for which it does so: BRIEF of tests/stand_in.py
    cells = [
        Cell.of(model="bert-base@random", method="full", batch_size=size, sequence_length=16, seed=brief)
        for size in range(1, 49)
    ]
    command = (sys.executable, "-m", "meftbench.worker", "--requests", "stand_in")
    return Load(
        Suite("kills", "", Protocol(on_oom="record"), tuple(cells), None),
        command,
        start_s=0.5,
        cell_s=0.1,
        most_between=6,
    )


def real() -> Load:
    """Eight cells of a tiny encoder with four methods, counted."""
    cells = [
        Cell.of(model="bert-tiny@random", method=method, batch_size=size, sequence_length=16)
        for method in ("full", "lora+checkpoint", "meft1-exact", "meft2")
        for size in (1, 2)
    ]
    protocol = Protocol(warmup=1, steps=1, passes=("memory",))
    return Load(Suite("kills", "", protocol, tuple(cells), None), None, start_s=6.0, cell_s=1.0, most_between=3)


LOADS: dict[str, Callable[[], Load]] = {"stand-in": stand_in, "real": real}


# --- engines: where cells run, and which processes there are to kill ---


def begin_local(load: Load, folder: Path, jobs: int) -> BaseProcess:
    """A runner of the local engine, as a process of its own."""
    options = {"command": load.command, "resume": True, "jobs": jobs}
    process = multiprocessing.get_context("fork").Process(target=_run, args=(load.suite, folder, options))
    process.start()
    return process


def _run(suite: Suite, folder: Path, options: dict[str, Any]) -> None:
    os.environ[MARK] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        run_suite(suite, folder, **options)
    except UserError as error:  # as the command ends; any other exception ends the process with 1
        sys.exit(error.exit_code)


def local_victims(runner: int) -> dict[str, list[int]]:
    """The processes that there are to kill, by what they are: the worker is the runner's child, cells are its."""
    with suppress(psutil.NoSuchProcess):
        worker, *cells = psutil.Process(runner).children(recursive=True) or [None]
        return {"runner": [runner], "worker": [worker.pid] if worker else [], "cell": [cell.pid for cell in cells]}
    return {victim: [] for victim in VICTIMS}


@dataclass(frozen=True)
class Engine:
    """begin: starts, or resumes, a run of a load in a folder, so many cells at a time.
    victims: the processes of a run that can be killed, by what they are; its argument is the runner's pid."""

    begin: Callable[[Load, Path, int], BaseProcess]
    victims: Callable[[int], dict[str, list[int]]]


ENGINES = {"local": Engine(begin_local, local_victims)}


# --- a run that is killed until it ends ---


@dataclass
class Kill:
    """A row of kills.csv.

    victim: "" where a run ended before anything was killed.  after_s: seconds since the run began or was resumed.
    before: records on the disk before the kill.
    exit_code: of the runner, in the row of the last kill before it ended, as are `records`, those on the disk then, and
        all counts. Other rows have none: the run went on.
    """

    engine: str
    load: str
    jobs: int
    run: int
    victim: str
    after_s: float
    exit_code: str = ""
    before: int = 0
    records: int = 0
    lost: int = 0
    repeated: int = 0
    torn: int = 0
    left: int = 0
    surprises: int = 0
    what: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return self.lost + self.repeated + self.torn + self.left + self.surprises


def kills_of_run(folder: Path, number: int, seed: int, engine: str = "local", load: str = "") -> Iterator[Kill]:
    """Begin run `number` in `folder`, kill its processes again and again, and resume it until all cells have ended."""
    chance, turns = random.Random(f"{seed} {number}"), count(number)
    name = load or ("stand-in" if number % REAL_EVERY else "real")
    jobs, chosen = chance.choice((1, 2)), LOADS[name]()
    ended, before = False, list[Record]()
    while not ended:
        kills, lost, began = list[Kill](), 0, time.monotonic()
        runner = ENGINES[engine].begin(chosen, folder, jobs)
        while runner.is_alive():
            _wait(runner, folder, chosen, chance)
            victim = VICTIMS[next(turns) % len(VICTIMS)]
            killed, found = _killed(ENGINES[engine], runner, victim, folder, chance)
            lost, before = lost + _lost(before, found), found
            after_s = round(time.monotonic() - began, 3)
            if killed:
                kills.append(Kill(engine, name, jobs, number, victim, after_s, before=len(before)))
            if killed and victim == "runner":
                break
        runner.join()
        ended = runner.exitcode == 0
        last = kills[-1] if kills else Kill(engine, name, jobs, number, "", 0.0, before=len(before))
        last.exit_code, last.lost = str(runner.exitcode), lost
        _count_left(last, folder)
        records = _count_records(last, folder, before)
        if runner.exitcode not in _expected({kill.victim for kill in kills}):
            last.surprises += 1
            last.what.append(f"exit code {runner.exitcode}")
        if ended:
            _count_ended(last, folder, chosen, records)
        yield from kills if kills or not last.faults else [last]


def _expected(victims: set[str]) -> set[int]:
    """Exit codes of a runner, by what was killed. A run goes on without its worker or a cell, and is refused in one
    line only where the worker was killed while it started."""
    codes = {0}
    if "worker" in victims:
        codes.add(INVALID)
    if "runner" in victims:
        codes.add(-signal.SIGKILL)
    return codes


def _wait(runner: BaseProcess, folder: Path, load: Load, chance: random.Random) -> None:
    """Wait until the run has a random number of records more than now, and a random time from then on."""
    more = chance.randrange(load.most_between)
    place = _lines(folder) + more
    while runner.is_alive() and _lines(folder) < place:
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, load.cell_s if more else load.start_s))


def _lines(folder: Path) -> int:
    """The number of lines in the records of a run."""
    file = folder / RECORDS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _killed(
    engine: Engine, runner: BaseProcess, victim: str, folder: Path, chance: random.Random
) -> tuple[bool, list[Record]]:
    """Kill the victim as soon as it is there. Whether it was, and the records that were on the disk before."""
    assert runner.pid is not None
    while runner.is_alive():
        if there := engine.victims(runner.pid)[victim]:
            before = read_records(folder / RECORDS)[0]
            with suppress(ProcessLookupError):
                os.kill(chance.choice(there), signal.SIGKILL)
                return True, before
    return False, read_records(folder / RECORDS)[0]


def _count_records(kill: Kill, folder: Path, before: list[Record]) -> list[Record]:
    """Count records that are no longer as they were, records of one cell, and files that cannot be read."""
    records, torn = read_records(folder / RECORDS)
    if torn:
        kill.torn += 1
        kill.what.append(f"{RECORDS} ends within a line")
    try:
        if records:
            load_run(folder)
    except UserError as error:
        kill.torn += 1
        kill.what.append(str(error))
    kill.records = len(records)
    kill.lost += _lost(before, records)
    kill.repeated += len(records) - len({(record.cell_id, record.repeat) for record in records})
    return records


def _lost(before: list[Record], now: list[Record]) -> int:
    """How many of the records that were there before are gone, or changed."""
    return sum(one != other for one, other in zip(before, now, strict=False)) + max(0, len(before) - len(now))


def _count_left(kill: Kill, folder: Path) -> None:
    """Count, and end, the processes of the run that do not end by themselves."""
    limit = time.monotonic() + ENDING_SECONDS
    while (left := list(_marked(folder))) and time.monotonic() < limit:
        time.sleep(0.01)
    for process in left:
        kill.left += 1
        with suppress(psutil.NoSuchProcess):
            kill.what.append(f"process {process.pid} {process.status()}: {' '.join(process.cmdline())[:80]}")
            process.kill()


def _marked(folder: Path) -> Iterator[psutil.Process]:
    """The processes that run with the mark of the run in their environment."""
    mark = f"{MARK}={folder}\0".encode()
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            content = Path(f"/proc/{process.pid}/environ").read_bytes()
            if mark in content and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                yield process


def _count_ended(kill: Kill, folder: Path, load: Load, records: list[Record]) -> None:
    """Of a run that says it has ended: count cells without a record, and files that do not belong to it. A resume, for
    which no worker starts, adds nothing."""
    kill.lost += len(load.suite.cells) - len({record.cell_id for record in records})
    more = {*os.listdir(folder)} - RUN_FILES
    more |= {file.name for file in folder.rglob("*.json*") if file.parent.name == "logs"}
    if more:
        kill.torn += len(more)
        kill.what.append(f"files {sorted(more)}")
    try:
        again = run_suite(load.suite, folder, resume=True, command=["false"]).records
    except UserError as error:
        kill.surprises += 1
        kill.what.append(str(error))
    else:
        kill.repeated += len(again) - len(records)


# --- the campaign ---

COLUMNS = [column.name for column in fields(Kill)]
COUNTS = ("lost", "repeated", "torn", "left", "surprises")


def summary(kills: pd.DataFrame, asked: int) -> str:
    """A table of counts by engine, load, cells at a time and victim, and what was found."""
    killed = kills[kills.victim != ""]
    lines = [
        (
            *map(str, key),
            f"{len(rows):,}",
            f"{(rows.before > 0).sum():,}",
            *(f"{rows[name].sum():,}" for name in COUNTS),
        )
        for key, rows in killed.groupby(["engine", "load", "jobs", "victim"])
    ]
    every = f"{len(killed):,}", f"{(killed.before > 0).sum():,}"
    lines.append(("all", "", "", "", *every, *(f"{kills[name].sum():,}" for name in COUNTS)))
    found = [f"- run {row.run}, {row.victim} killed: {row.what}" for row in kills.itertuples() if row.what]
    parts = [
        "# Kills",
        f"{len(killed):,} of {asked:,} kills by SIGKILL at random moments, over {kills.run.nunique():,} runs that were "
        "resumed until they ended. `stand-in`: cells that sleep for 10 ms; `real`: cells of a tiny encoder. What is "
        "counted is said in `reports/campaigns/kills.py`; each count must be 0. `with records`: kills of runs that had "
        "finished cells by then.",
        markdown_table(("engine", "cells", "at a time", "killed", "kills", "with records", *COUNTS), lines),
        "## What was found",
        "\n".join(found) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=1000, help="at least so many kills of this engine (1000)")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="local", help="where cells run (local)")
    parser.add_argument("--load", choices=tuple(LOADS), default="", help="one of these alone; both by default")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args(arguments)
    try:
        made(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    file = options.out / "kills.csv"
    earlier = read_kills(file) if file.exists() else None
    mine = None if earlier is None else earlier[earlier.engine == options.engine]
    done = 0 if mine is None else int((mine.victim != "").sum())
    first = 0 if mine is None or mine.empty else int(mine.run.max()) + 1
    facts = json.dumps(environment(gpus.read(), {}), indent=1) + "\n"
    write_whole(options.out / "environment.json", facts)
    with file.open("a", encoding="utf-8", newline="") as stream, tempfile.TemporaryDirectory() as place:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if earlier is None:
            writer.writeheader()
        for number in count(first):
            if done >= options.kills:
                break
            for kill in kills_of_run(Path(place) / str(number), number, options.seed, options.engine, options.load):
                writer.writerow(asdict(kill) | {"what": "; ".join(kill.what).replace(place, "")})
                stream.flush()
                done += bool(kill.victim)
    kills = read_kills(file)
    write_whole(options.out / "summary.md", summary(kills, options.kills))
    print(summary(kills, options.kills))
    return OVER_BUDGET if kills[list(COUNTS)].to_numpy().any() else DONE


def read_kills(file: Path) -> pd.DataFrame:
    """kills.csv, texts that are empty as such."""
    return pd.read_csv(file, keep_default_na=False)


if __name__ == "__main__":
    sys.exit(main())
