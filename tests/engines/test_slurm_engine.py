"""Cells as jobs of Slurm; here the jobs are processes, by submitit's executor for one machine."""

import os
import signal

import psutil
import pytest
from first_time import COMMAND, EACH_TIME
from moments import in_background, running

from builders import a_cell
from meftbench.errors import UserError
from meftbench.records.store import load_run
from meftbench.runner import run_suite
from meftbench.runner.slurm_engine import SlurmEngine
from stand_in import BROKEN, ENDLESS, FINE, KILLED, OUT_OF_MEMORY
from sweeps import WORKER, a_suite, alive, does, statuses, sweep, wait_until

pytest.importorskip("submitit")
pytestmark = pytest.mark.slow


def an_engine(**options):
    return SlurmEngine({}, **({"cluster": "local", "command": WORKER} | options))


def test_the_records_are_those_of_the_local_engine(tmp_path):
    cell = a_cell(model="bert-tiny@random", method="lora", batch_size=2, sequence_length=16)
    suite = a_suite(cell, warmup=1, steps=1, passes=["memory"], threads=1)

    here = run_suite(suite, tmp_path / "here")
    there = run_suite(suite, tmp_path / "there", engine=SlurmEngine({}, cluster="local"))

    [first], [second] = here.records, there.records
    names = [name for name, metric in first.metrics.items() if metric.source == "counted"]
    assert len(names) > 20
    assert [first.metrics[name] for name in names] == [second.metrics[name] for name in names]
    assert (first.environment_id, first.host, first.cell) == (second.environment_id, second.host, second.cell)


def test_cells_end_as_on_this_machine_and_nothing_is_left(tmp_path, marks):
    suite = a_suite(*does(FINE, OUT_OF_MEMORY, BROKEN, KILLED, ENDLESS), timeout=1.0)

    here, there = sweep(suite, tmp_path / "here"), run_suite(suite, tmp_path / "there", engine=an_engine(jobs=3))

    ends = [{r.cell_id: (r.status, r.status_detail.get("type")) for r in run.records} for run in (here, there)]
    assert ends[0] == ends[1]
    assert not (tmp_path / "there" / "logs" / "slurm").exists()


def test_a_job_that_is_killed_is_an_error(tmp_path, marks):
    def kill():
        cell = psutil.Process(running(marks, EACH_TIME)[0])
        next(p for p in cell.parents() if "submitit.core._submit" in p.cmdline()).send_signal(signal.SIGKILL)

    thread = in_background(kill, lambda: running(marks, EACH_TIME))
    run = run_suite(a_suite(a_cell(seed=EACH_TIME)), tmp_path / "run", engine=an_engine(command=COMMAND))
    thread.join()

    assert ["error"] == statuses(run)
    assert "NoResult" == run.records[0].status_detail["type"]
    wait_until(lambda: not any(map(alive, running(marks, EACH_TIME))))


def test_an_interruption_ends_the_jobs(tmp_path, marks):
    for mark in marks.glob(f"{EACH_TIME}-*"):
        mark.unlink()
    thread = in_background(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: running(marks, EACH_TIME))
    with pytest.raises(KeyboardInterrupt):
        run_suite(a_suite(a_cell(seed=EACH_TIME)), tmp_path / "run", engine=an_engine(command=COMMAND))
    thread.join()

    wait_until(lambda: not any(map(alive, running(marks, EACH_TIME))))
    assert [] == load_run(tmp_path / "run").records


def test_an_option_that_sbatch_has_not_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--slurm: .*no_such"):
        run_suite(a_suite(), tmp_path / "run", engine=SlurmEngine({"no_such": "1"}, cluster="local", command=WORKER))

    assert not (tmp_path / "run").exists()


def test_a_preempted_job_runs_its_cell_again(tmp_path):
    """What submitit queues again is the same call."""
    from meftbench.runner.slurm_engine import CellOfJob

    call = CellOfJob("{}", "{}", "result.json", None, None)

    assert call == call.checkpoint().function
