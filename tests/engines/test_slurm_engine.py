"""Cells as jobs of Slurm: on a cluster of two nodes on this machine where Slurm is installed (slurm_cluster.py), else
as processes, by submitit's executor for one machine."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from first_time import COMMAND, EACH_TIME, FIRST_TIME
from moments import in_background, running
from slurm_cluster import INSTALLED, slurm_cluster

from builders import a_cell
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.records.store import load_run
from meftbench.runner import run_suite, slurm_jobs
from meftbench.runner.slurm_engine import SlurmEngine
from stand_in import BROKEN, ENDLESS, FINE, KILLED, OUT_OF_MEMORY
from sweeps import WORKER, a_suite, alive, does, statuses, sweep, wait_until

pytest.importorskip("submitit")
pytestmark = pytest.mark.slow
on_slurm = pytest.mark.skipif(not INSTALLED and not os.environ.get("CI_SLURM"), reason="needs Slurm")


@pytest.fixture(scope="module")
def slurm(marks, tmp_path_factory):
    """The cluster; None where Slurm is not installed."""
    if not INSTALLED:
        yield None
        return
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def an_engine(slurm, monkeypatch):
    """Engines that ask Slurm often, on the cluster."""
    monkeypatch.setattr(slurm_jobs, "STATE_SECONDS", 0.5)

    def make(options=None, **more):
        return SlurmEngine(options or {}, **({"cluster": "slurm" if slurm else "local", "command": WORKER} | more))

    return make


@pytest.fixture
def unmarked(marks):
    """Cells of `first_time` have not begun yet."""
    for mark in marks.glob("*.began"):
        mark.unlink()


def test_the_records_are_those_of_the_local_engine(tmp_path, an_engine):
    cell = a_cell(model="bert-tiny@random", method="lora", batch_size=2, sequence_length=16)
    suite = a_suite(cell, warmup=1, steps=1, passes=["memory"], threads=1)

    here = run_suite(suite, tmp_path / "here")
    there = run_suite(suite, tmp_path / "there", engine=an_engine(command=None))

    [first], [second] = here.records, there.records
    names = [name for name, metric in first.metrics.items() if metric.source == "counted"]
    assert len(names) > 20
    assert [first.metrics[name] for name in names] == [second.metrics[name] for name in names]
    assert (first.environment_id, first.host, first.cell) == (second.environment_id, second.host, second.cell)


def test_cells_end_as_on_this_machine_and_nothing_is_left(tmp_path, an_engine):
    suite = a_suite(*does(FINE, OUT_OF_MEMORY, BROKEN, KILLED, ENDLESS), timeout=1.0)

    here, there = sweep(suite, tmp_path / "here"), run_suite(suite, tmp_path / "there", engine=an_engine(jobs=3))

    ends = [{r.cell_id: (r.status, r.status_detail.get("type")) for r in run.records} for run in (here, there)]
    assert ends[0] == ends[1]
    assert not (tmp_path / "there" / "logs" / "slurm").exists()


def job_of(cell):
    """The process of the job that runs a cell of this pid."""
    return next(p for p in psutil.Process(cell).parents() if "submitit.core._submit" in p.cmdline())


def test_a_job_that_is_killed_is_an_error(tmp_path, marks, unmarked, an_engine):
    thread = in_background(
        lambda: job_of(running(marks, EACH_TIME)[0]).send_signal(signal.SIGKILL), lambda: running(marks, EACH_TIME)
    )
    run = run_suite(a_suite(a_cell(seed=EACH_TIME)), tmp_path / "run", engine=an_engine(command=COMMAND))
    thread.join()

    assert ["error"] == statuses(run)
    assert "NoResult" == run.records[0].status_detail["type"]
    wait_until(lambda: not any(map(alive, running(marks, EACH_TIME))))


def test_an_interruption_ends_the_jobs(tmp_path, marks, unmarked, an_engine):
    thread = in_background(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: running(marks, EACH_TIME))
    with pytest.raises(KeyboardInterrupt):
        run_suite(a_suite(a_cell(seed=EACH_TIME)), tmp_path / "run", engine=an_engine(command=COMMAND))
    thread.join()

    wait_until(lambda: not any(map(alive, running(marks, EACH_TIME))))
    assert [] == load_run(tmp_path / "run").records


def test_a_number_that_is_none_is_one_line(tmp_path, an_engine):
    with pytest.raises(UserError, match=r"^--slurm: .*mem_gb.*write a whole number"):
        run_suite(a_suite(), tmp_path / "run", engine=an_engine({"mem_gb": "many"}))

    assert not (tmp_path / "run").exists()


def test_a_preempted_job_runs_its_cell_again(tmp_path):
    """What submitit queues again is the same call."""
    from meftbench.runner.slurm_engine import CellOfJob

    call = CellOfJob("{}", "{}", "result.json", None, None)

    assert call == call.checkpoint().function


# --- what only Slurm does ---


@on_slurm
@pytest.mark.parametrize(
    ("options", "said"),
    [({"partition": "nowhere"}, r"[^\n]*nowhere"), ({"no_such": "1"}, r"[^\n]*no-such"), ({"mem": ""}, r"[^\n]*mem")],
)
def test_what_sbatch_refuses_is_one_line(tmp_path, an_engine, capfd, options, said):
    with pytest.raises(UserError, match=rf"^--engine slurm: sbatch refuses: {said}") as refused:
        run_suite(a_suite(), tmp_path / "run", engine=an_engine(options))

    assert NOT_COMPARABLE == refused.value.exit_code
    assert "" == capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@on_slurm
def test_any_option_of_sbatch_is_taken(tmp_path, an_engine):
    """Those that submitit has no name for, and those without a value."""
    run = run_suite(a_suite(), tmp_path / "run", engine=an_engine({"nice": "5", "contiguous": ""}))

    assert ["ok"] == statuses(run)


def job_id_of(cell):
    """Slurm's id of the job that runs a cell of this pid."""
    environment = psutil.Process(cell).environ()
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def interrupted_by(tmp_path, marks, an_engine, seed, action):
    """The run of three cells of which one is of `seed`, to whose pid `action` is done when it has begun."""
    suite = a_suite(*(a_cell(seed=one, batch_size=n) for n, one in enumerate((FINE, seed, FINE), 1)))
    thread = in_background(lambda: action(running(marks, seed)[0]), lambda: running(marks, seed))
    run = run_suite(suite, tmp_path / "run", engine=an_engine(command=COMMAND))
    thread.join()
    assert len({record.cell_id for record in run.records}) == len(run.records) == 3
    return next(record for record in run.records if record.cell["seed"] == seed)


@on_slurm
def test_a_job_that_somebody_cancels_is_an_error(tmp_path, marks, unmarked, an_engine, slurm):
    record = interrupted_by(tmp_path, marks, an_engine, EACH_TIME, lambda cell: slurm.call("scancel", job_id_of(cell)))

    assert ("error", "NoResult") == (record.status, record.status_detail["type"])
    assert "CANCELLED" in record.status_detail["message"]


@on_slurm
def test_a_job_that_slurm_queues_again_runs_its_cell_again(tmp_path, marks, unmarked, an_engine, slurm):

    def queue_again(cell):
        job = job_id_of(cell)
        slurm.call("scontrol", "update", f"JobId={job}", "Requeue=1")
        slurm.call("scontrol", "requeue", job)
        while "StartTime" in (found := slurm.call("scontrol", "show", "job", job)) and "PENDING" not in found:
            time.sleep(0.1)
        slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for two minutes

    record = interrupted_by(tmp_path, marks, an_engine, FIRST_TIME, queue_again)

    assert "ok" == record.status


@on_slurm
def test_a_node_that_is_lost_costs_no_cell(tmp_path, marks, unmarked, an_engine, slurm):
    """Its cell is submitted once more, where Slurm does not queue the job again."""

    def lose(cell):
        node = psutil.Process(cell).environ()["SLURMD_NODENAME"]
        slurm.kill_node(node)
        slurm.start_node(node)  # at once: Slurm sees that the job is no longer there

    record = interrupted_by(tmp_path, marks, an_engine, FIRST_TIME, lose)

    assert "ok" == record.status
    assert "NODE_FAIL" in record.status_detail["retried_after"]["message"]


@on_slurm
def test_a_controller_that_is_lost_costs_no_cell(tmp_path, marks, unmarked, an_engine, slurm):
    """Neither cells that run nor those that are submitted while it is away."""

    def lose(cell):
        slurm.kill_controller()
        psutil.Process(cell).kill()  # its result comes, and the next cell is to be submitted
        time.sleep(4)
        slurm.start_controller()

    record = interrupted_by(tmp_path, marks, lambda **options: an_engine(jobs=1, **options), EACH_TIME, lose)

    assert ("error", "Killed") == (record.status, record.status_detail["type"])


DRIVER = """
import sys
from first_time import COMMAND
from meftbench.runner import run_suite
from meftbench.runner.slurm_engine import SlurmEngine
from test_slurm_engine import LEFT
run_suite(LEFT, sys.argv[1], engine=SlurmEngine({}, command=COMMAND))
"""
LEFT = a_suite(a_cell(seed=FIRST_TIME), a_cell(seed=FINE))


@on_slurm
def test_what_a_killed_command_leaves_in_the_queue_is_cancelled_by_the_next(tmp_path, marks, unmarked, an_engine):
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "run")]) as driver:
        wait_until(lambda: running(marks, FIRST_TIME))
        driver.kill()
    [left] = running(marks, FIRST_TIME)
    assert alive(left)

    run = run_suite(LEFT, tmp_path / "run", engine=an_engine(command=COMMAND), resume=True)

    assert ["ok", "ok"] == statuses(run)
    wait_until(lambda: not alive(left))
