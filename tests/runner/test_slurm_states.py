"""What Slurm says of jobs that leave no result, by a stand-in for submitit whose jobs run in this process."""

import os
import sys
from types import SimpleNamespace

import pytest

from builders import a_cell
from meftbench.runner import Noted, run_suite, slurm_engine
from meftbench.runner.slurm_engine import SlurmEngine
from sweeps import WORKER, a_suite, statuses


class Job:
    watcher = None

    def __init__(self, number, state):
        self.job_id, self.state, self.asked = f"7_{number}", state, 0

    def get_info(self, mode):
        self.asked += 1

    def stderr(self):
        return "slurmstepd: error: ***\n"

    def cancel(self, check):
        raise AssertionError("a job that has ended is not cancelled")


class Executor:
    """states: how the next jobs of cells end; those that complete run here.  arrays: their sizes.  parameters: all."""

    states: list[str]
    arrays: list[int]
    parameters: list[dict]

    def __init__(self, folder, cluster):
        assert "slurm" == cluster

    def update_parameters(self, **parameters):
        Executor.parameters.append(parameters)

    def submit(self, call):
        call()
        return Job(0, "COMPLETED")

    def submit_array(self, calls):
        Executor.arrays.append(len(calls))
        return [self.ended(number, call) for number, call in enumerate(calls)]

    def ended(self, number, call):
        state = Executor.states.pop(0) if Executor.states else "COMPLETED"
        if state == "COMPLETED":
            call()
        return Job(number, state)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A machine with Slurm's commands."""
    Executor.states, Executor.arrays, Executor.parameters = [], [], []
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(slurm_engine, "LATE_SECONDS", 0.0)
    told = tmp_path / "scancel.txt"
    (tmp_path / "bin").mkdir()
    for name, script in (("sbatch", "exit 1"), ("scancel", f'echo "$@" >> {told}')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return told


def run_on(folder, suite, jobs=8, **options):
    events = []
    engine = SlurmEngine({"partition": "gpu", "cpus_per_task": "4"}, jobs, command=WORKER)
    return run_suite(suite, folder, engine=engine, on_event=events.append, **options), events


def test_all_that_is_given_is_one_array(slurm, tmp_path):
    """With the options of the user, and the time that the protocol allows."""
    suite = a_suite(*(a_cell(batch_size=n) for n in (1, 2, 3)), timeout=3600.0)

    run, _ = run_on(tmp_path / "run", suite)

    assert ["ok"] * 3 == statuses(run)
    assert [3] == Executor.arrays
    assert {"slurm_partition": "gpu", "cpus_per_task": 4}.items() <= Executor.parameters[-1].items()
    assert 71 == Executor.parameters[-1]["timeout_min"]
    assert {4} == {record.cell["threads"] for record in run.records}
    assert slurm.read_text().startswith("--me --name=meftbench-")


def test_a_job_whose_node_failed_is_submitted_once_more(slurm, tmp_path):
    Executor.states = ["NODE_FAIL"]

    run, events = run_on(tmp_path / "run", a_suite())

    assert ["ok"] == statuses(run)
    assert "NodeLost" == run.records[0].status_detail["retried_after"]["type"]
    [note] = [event.text for event in events if isinstance(event, Noted)]
    assert "its Slurm job 7_0 ended as NODE_FAIL" in note


@pytest.mark.parametrize(
    ("state", "status", "kind"),
    [
        ("TIMEOUT", "timeout", "Timeout"),
        ("OUT_OF_MEMORY", "oom", "Killed"),
        ("CANCELLED by 1000", "error", "NoResult"),
        ("FAILED", "error", "NoResult"),
        ("COMPLETED+", "error", "NoResult"),
    ],
)
def test_how_slurm_ended_a_job_is_how_its_cell_ended(slurm, tmp_path, state, status, kind):
    Executor.states = [state]

    run, _ = run_on(tmp_path / "run", a_suite())

    [record] = run.records
    assert (status, kind) == (record.status, record.status_detail["type"])
    assert "slurmstepd: error: ***" in record.status_detail["message"]


def test_two_failures_of_nodes_are_recorded(slurm, tmp_path):
    Executor.states = ["NODE_FAIL", "BOOT_FAIL"]

    run, _ = run_on(tmp_path / "run", a_suite())

    assert ("error", "NodeLost") == (run.records[0].status, run.records[0].status_detail["type"])
