"""kill -9 of the runner, its worker or a cell at random moments: nothing lost, repeated, torn or left."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field

import psutil
import pytest

from builders import a_cell
from meftbench.records.store import RECORDS, read_records
from meftbench.runner import run_suite
from stand_in import BRIEF
from sweeps import WORKER, a_suite, sweep, wait_until

SUITE = a_suite(*(a_cell(batch_size=size, seed=BRIEF) for size in range(1, 25)))
VICTIMS = ("runner", "worker", "cell")


def begun(folder):
    process = multiprocessing.get_context("fork").Process(
        target=run_suite, args=(SUITE, folder), kwargs={"command": WORKER, "resume": True}
    )
    process.start()
    return process


def family(pid):
    """The processes of a runner: its worker, then those of cells; those that have gone in the meantime are left out."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@dataclass
class Kills:
    """How often each was killed, and what was found then."""

    counts: dict = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    left: set = field(default_factory=set)

    def kill(self, victim, runner, chance):
        """Kill it when it is there and a random moment has passed."""
        time.sleep(chance.uniform(0.0, 0.5))
        while runner.is_alive():
            processes = family(runner.pid)
            self.left |= set(processes)
            chosen = {"runner": [runner.pid], "worker": processes[:1], "cell": processes[1:2]}[victim]
            if chosen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(getattr(chosen[0], "pid", chosen[0]), signal.SIGKILL)
                    self.counts[victim] += 1
                return


def killed_often(tmp_path, seed, times):
    """Runs of SUITE in which so many processes are killed: each run is taken up until it has ended."""
    chance, kills, number = random.Random(seed), Kills(), 0
    while sum(kills.counts.values()) < times:
        folder = tmp_path / str(number)
        runner = begun(folder)
        before = read_records(folder / RECORDS)[0]
        kills.kill(victim := chance.choice(VICTIMS), runner, chance)
        runner.join()
        # A run goes on without a worker or a cell that was killed, except where the worker was about to start.
        assert runner.exitcode in {"runner": (0, -9), "worker": (0, 1), "cell": (0,)}[victim]
        found = read_records(folder / RECORDS)[0]
        assert before == found[: len(before)], "a finished record was lost, or changed"
        assert len(found) == len({record.cell_id for record in found}), "a cell has two records"
        if runner.exitcode == 0:
            assert len(SUITE.cells) == len(found), "not every cell has a record, and the exit code is 0"
        if len(found) == len(SUITE.cells):
            assert len(SUITE.cells) == len(sweep(SUITE, folder, resume=True, command=["false"]).records)
            assert {RECORDS, "suite.yaml", "environment.json", ".lock"} == {*os.listdir(folder)} - {"logs"}
            number += 1
    wait_until(lambda: not any(is_alive(process) for process in kills.left))
    return kills.counts


def is_alive(process):
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_kills_at_random_moments(tmp_path):
    counts = killed_often(tmp_path, seed=2026, times=6)

    assert all(counts.values()), counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_at_random_moments(tmp_path, seed):
    counts = killed_often(tmp_path, seed, times=40)

    assert min(counts.values()) >= 5, counts
