"""kill -9 at random moments: whether a run that is resumed afterwards has lost, repeated, torn or left anything.

    python reports/campaigns/kills.py reports/kills --kills 1000                  # half an hour on two cores
    python reports/campaigns/kills.py reports/kills --kills 200 --engine ray      # needs meftbench[ray]
    python reports/campaigns/kills.py reports/kills --kills 200 --engine slurm    # needs meftbench[slurm], and Slurm

A run is begun in a process of its own. Again and again, after a random number of records and a random time more, its
worker server or one of its cells is killed, or a job, an actor or a whole node, until its runner is killed, too, or
ends; then the run is resumed, until all its cells have ended. Most runs have cells of a stand-in that loads no torch;
every REAL_EVERY-th run measures cells of real, tiny models.

Whenever a runner has ended are counted:
    lost       records that were on the disk before the kill and are not there, unchanged, after it; cells without a
               record in a run that says it has ended
    repeated   records of a cell that has one already
    torn       files of the run that cannot be read as a whole, and temporary files in a run that has ended
    left       processes that the run had started and that still run when it has ended
    surprises  runners that end in another way than they should, such as with a traceback; records of cells that failed
               though nothing was killed that they need, or with the numbers of another cell

Writes kills.csv with a row a kill, environment.json, and summary.md, which is also printed. Exits 1 where a count is
not 0. It may be interrupted and called again: kills in kills.csv are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path

import pandas as pd
import psutil
from killed_engines import ENGINES, Local, engine_named
from killed_run import CELLS, LOADS, Load

from meftbench.errors import DONE, OVER_BUDGET, UserError
from meftbench.records.record import Record
from meftbench.records.store import RECORDS, load_run, made, read_records, write_whole
from meftbench.report.render.verdicts import markdown_table
from meftbench.runner import gpus, run_suite
from meftbench.runner.environment import environment

REAL_EVERY = 12  # one run of so many measures real models: each takes a quarter of a minute, mostly to import torch
REAL_START, REAL_CELL = 6.0, 1.0  # seconds that such a worker takes to start, and a cell to end, about
ENDING_SECONDS = 60.0  # within which the processes of a run whose runner was killed have to end by themselves
RUN_FILES = {RECORDS, "suite.yaml", "environment.json", "environments", ".lock", "logs"}


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


def kills_of_run(
    engine: Local, folder: Path, number: int, seed: int, name: str = "local", load: str = ""
) -> Iterator[Kill]:
    """Begin run `number` in `folder`, kill its processes again and again, and resume it until all cells have ended."""
    chance, turns = random.Random(f"{seed} {number}"), count(number)
    load = load or ("stand-in" if number % REAL_EVERY else "real")
    jobs, cells = chance.choice(engine.jobs), LOADS[load](CELLS[name])
    ended, before, costly = False, list[Record](), 0
    while not ended:
        kills, lost, began = list[Kill](), 0, time.monotonic()
        runner = engine.begin(load, jobs, folder)
        while runner.poll() is None:
            _wait(runner, folder, engine, load, chance)
            victim = engine.victims[next(turns) % len(engine.victims)]
            killed, found = _killed(engine, runner, victim, folder, chance)
            lost, before = lost + _lost(before, found), found
            after_s = round(time.monotonic() - began, 3)
            if killed:
                kills.append(Kill(name, load, jobs, number, victim, after_s, before=len(before)))
                costly += (victim in engine.costly) * (1 if victim == "cell" else jobs)
            if killed and victim == "runner":
                break
        _, said = runner.communicate()
        ended = runner.returncode == 0
        last = kills[-1] if kills else Kill(name, load, jobs, number, "", 0.0, before=len(before))
        last.exit_code, last.lost = str(runner.returncode), lost
        if ended or not engine.outlived:
            _count_left(last, engine, folder)
        records = _count_records(last, folder, before)
        if runner.returncode not in _expected(engine, {kill.victim for kill in kills}):
            last.surprises += 1
            last.what.append(f"exit code {runner.returncode}: {said[-300:]}")
        if ended:
            _count_ended(last, folder, cells, records)
            _count_wrong(last, cells, records, costly)
        yield from kills if kills or not last.faults else [last]


def _expected(engine: Local, victims: set[str]) -> set[int]:
    """Exit codes of a runner, by what was killed. A run goes on without most of it, and is refused in one line only
    where something was killed while it began, or where no node is left."""
    codes = {0}.union(*(engine.refusals.get(victim, set()) for victim in victims))
    return codes | ({-signal.SIGKILL} if "runner" in victims else set())


def _wait(runner: subprocess.Popen[str], folder: Path, engine: Local, load: str, chance: random.Random) -> None:
    """Wait until the run has a random number of records more than now, and a random time from then on."""
    start_s, cell_s = engine.start_s, engine.cell_s
    if load == "real":
        start_s, cell_s = start_s + REAL_START, cell_s + REAL_CELL
    more = chance.randrange(engine.most_between)
    place = _lines(folder) + more
    while runner.poll() is None and _lines(folder) < place:
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, cell_s if more else start_s))


def _lines(folder: Path) -> int:
    """The number of lines in the records of a run."""
    file = folder / RECORDS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _killed(
    engine: Local, runner: subprocess.Popen[str], victim: str, folder: Path, chance: random.Random
) -> tuple[bool, list[Record]]:
    """Kill the victim as soon as it is there. Whether it was, and the records that were on the disk before."""
    while runner.poll() is None:
        if there := engine.there(runner, folder)[victim]:
            before = read_records(folder / RECORDS)[0]
            if engine.kill(victim, chance.choice(there)):
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


def _count_left(kill: Kill, engine: Local, folder: Path) -> None:
    """Count, and end, the processes of the run that do not end by themselves."""
    limit = time.monotonic() + ENDING_SECONDS
    while (left := list(engine.processes(folder))) and time.monotonic() < limit:
        time.sleep(0.01)
    for process in left:
        kill.left += 1
        with suppress(psutil.NoSuchProcess):
            kill.what.append(f"process {process.pid} {process.status()}: {' '.join(process.cmdline())[:80]}")
            process.kill()


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


def _count_wrong(kill: Kill, load: Load, records: list[Record], costly: int) -> None:
    """Of a run that has ended: count records that failed beyond the number of cells that kills may have cost, and
    records with the numbers of another cell."""
    failed = [record for record in records if record.status != "ok"]
    if len(failed) > costly:
        kill.surprises += 1
        kill.what.append(f"{len(failed)} cells failed: {failed[0].status_detail}")
    cells = {cell.cell_id: cell for cell in load.suite.cells}
    peaks = {record.cell_id: record.value("activation_peak_bytes") for record in records if record.status == "ok"}
    if wrong := [cell_id for cell_id, peak in peaks.items() if not load.has_numbers_of(cells[cell_id], peak)]:
        kill.surprises += len(wrong)
        kill.what.append(f"{len(wrong)} cells have the numbers of another")


# --- the campaign ---

COLUMNS = [column.name for column in fields(Kill)]
COUNTS = ("lost", "repeated", "torn", "left", "surprises")


def summary(kills: pd.DataFrame) -> str:
    """A table of counts by engine, load, cells at a time and victim, and what was found."""
    killed, runs = kills[kills.victim != ""], len(kills[["engine", "run"]].drop_duplicates())
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
    found = [
        f"- {row.engine}, run {row.run}, {row.victim} killed: {row.what}" for row in kills.itertuples() if row.what
    ]
    parts = [
        "# Kills",
        f"{len(killed):,} kills by SIGKILL at random moments, over {runs:,} runs that were resumed until they ended. "
        "`stand-in`: cells that sleep for 10 ms; `real`: cells of a tiny encoder. `ray`: a cluster of three nodes as "
        "processes of one machine; `slurm`: a Slurm of two. What is counted is said in `reports/campaigns/kills.py`; "
        "each count must be 0. `with records`: kills of runs that had finished cells by then.",
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
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where cells run (local)")
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
    with (
        file.open("a", encoding="utf-8", newline="") as stream,
        tempfile.TemporaryDirectory() as place,
        engine_named(options.engine, Path(place)) as engine,
    ):
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if earlier is None:
            writer.writeheader()
        for number in count(first):
            if done >= options.kills:
                break
            folder = Path(place) / str(number)
            for kill in kills_of_run(engine, folder, number, options.seed, options.engine, options.load):
                writer.writerow(asdict(kill) | {"what": "; ".join(kill.what).replace(place, "")})
                stream.flush()
                done += bool(kill.victim)
    kills = read_kills(file)
    write_whole(options.out / "summary.md", summary(kills))
    print(summary(kills))
    return OVER_BUDGET if kills[list(COUNTS)].to_numpy().any() else DONE


def read_kills(file: Path) -> pd.DataFrame:
    """kills.csv, texts that are empty as such."""
    return pd.read_csv(file, keep_default_na=False)


if __name__ == "__main__":
    sys.exit(main())
