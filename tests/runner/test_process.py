"""The parent's side of the worker: whatever happens to a process, its job has an outcome."""

import os
import signal
import sys
from pathlib import Path

import pytest

import stand_in
from builders import a_cell
from meftbench.errors import UserError
from meftbench.plan.protocol import Protocol
from meftbench.runner import process
from meftbench.runner.job import Job
from meftbench.runner.process import Worker, worker_environment
from meftbench.worker import _without_machine
from sweeps import WORKER, alive, told, wait_until

SPAWNING = (*WORKER, "--spawn")


@pytest.fixture
def a_worker(tmp_path):
    """Start workers that are ended with the test."""
    workers = []

    def start(command=WORKER, **environment):
        workers.append(Worker(dict(os.environ) | environment, tmp_path / "worker.log", command))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def a_stub(manner):
    return (sys.executable, str(Path(__file__).parent / "stub_server.py"), manner)


def a_job(tmp_path, behaviour=stand_in.FINE, **fields):
    given = {
        "cell": a_cell(seed=behaviour),
        "repeat": 0,
        "protocol": Protocol(),
        "result": tmp_path / f"{behaviour}.json",
        "log": tmp_path / f"{behaviour}.log",
        "timeout": 60.0,
    }
    return Job(**(given | fields))


def outcome_of(worker, job):
    worker.give(job)
    return worker.poll()


@pytest.mark.parametrize("command", [WORKER, SPAWNING], ids=["fork", "spawn"])
def test_a_cell_that_fits_comes_back_with_its_metrics(a_worker, tmp_path, command):
    """Metrics and observations are those of the measurement, and no file is left behind."""
    outcome = outcome_of(a_worker(command), a_job(tmp_path))

    assert "ok" == outcome.status
    assert 8000 == outcome.metrics["activation_peak_bytes"].value
    assert "sdpa" == outcome.observed["attention_used"]
    assert outcome.wall_s > 0
    assert {"worker.log"} == {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("command", [WORKER, SPAWNING], ids=["fork", "spawn"])
@pytest.mark.parametrize(
    ("behaviour", "status", "detail"),
    [
        (stand_in.OUT_OF_MEMORY, "oom", {"phase": "backward", "requested_bytes": 4096}),
        (stand_in.HOST_OUT_OF_MEMORY, "oom", {"type": "MemoryError"}),
        (stand_in.CPU_ALLOCATOR, "oom", {"type": "RuntimeError", "requested_bytes": 4096}),
        (stand_in.KILLED, "error", {"exit_signal": 9, "type": "Killed"}),
        (stand_in.CRASHED, "error", {"exit_signal": 11, "type": "Crash"}),
        (stand_in.BROKEN, "error", {"type": "ZeroDivisionError", "message": "a bug in a probe"}),
        (stand_in.WRONG, "error", {"type": "UserError", "message": "model: has no weights; download it"}),
        (stand_in.QUITTER, "error", {"type": "SystemExit", "message": "leaving"}),
        (stand_in.NOT_A_NUMBER, "error", {"type": "ValueError"}),
        (stand_in.SILENT, "error", {"type": "NoResult"}),
    ],
)
def test_every_way_to_fail_is_an_outcome(a_worker, tmp_path, command, behaviour, status, detail):
    """Failures have a status and a type, and the worker serves the next job."""
    worker = a_worker(command)

    outcome = outcome_of(worker, a_job(tmp_path, behaviour))

    assert status == outcome.status
    assert detail == {key: outcome.detail.get(key) for key in detail}
    assert "ok" == outcome_of(worker, a_job(tmp_path)).status


def test_a_bug_comes_with_its_traceback(a_worker, tmp_path):
    """The traceback names the place, and a user's error has none."""
    worker = a_worker()

    assert "stand_in.py" in outcome_of(worker, a_job(tmp_path, stand_in.BROKEN)).detail["traceback"]
    assert "traceback" not in outcome_of(worker, a_job(tmp_path, stand_in.WRONG)).detail


@pytest.mark.parametrize("end", ["meftbench/worker.py", "site-packages/torch/nn/m.py", "python3.11/json/__init__.py"])
def test_a_traceback_names_no_folder_of_the_machine(end):
    """Of a file below the package, site-packages or Python's own library, the rest of its path."""
    assert f'File "{end}", line 3' == _without_machine(f'File "/home/me/lib/{end}", line 3')


def test_the_last_words_of_a_process_without_a_result_are_reported(a_worker, tmp_path):
    assert "last words" in outcome_of(a_worker(), a_job(tmp_path, stand_in.SILENT)).detail["message"]


def test_a_cell_cannot_speak_for_the_worker(a_worker, tmp_path):
    """What a cell, or a program it starts, writes to stdout ends in its log and ends no job."""
    job = a_job(tmp_path, stand_in.TALKATIVE)

    assert "ok" == outcome_of(a_worker(), job).status
    assert job.log.read_text().count("exited") >= 2


def test_host_memory_is_limited_so_that_its_end_is_an_error_and_not_a_kill(a_worker, tmp_path):
    """More than `memory_bytes` is out of memory, by exception."""
    outcome = outcome_of(a_worker(), a_job(tmp_path, stand_in.HOARDER, memory_bytes=2**28))

    assert ("oom", "MemoryError") == (outcome.status, outcome.detail["type"])


@pytest.mark.parametrize("command", [WORKER, SPAWNING], ids=["fork", "spawn"])
def test_a_timeout_kills_the_process_group(a_worker, tmp_path, told_file, command):
    """What a cell has started dies with it."""
    outcome = outcome_of(a_worker(command), a_job(tmp_path, stand_in.PARENT, timeout=1.5))

    assert "timeout" == outcome.status
    assert "1.5 s" in outcome.detail["message"]
    [(_, grandchild)] = told(told_file, "grandchild")
    wait_until(lambda: not alive(int(grandchild)))
    assert not alive(outcome.pid)


def test_what_a_cell_leaves_running_is_killed_when_it_ends(a_worker, tmp_path, told_file, monkeypatch):
    """A grandchild does not outlive a cell that is killed by somebody else."""
    worker = a_worker()
    worker.give(a_job(tmp_path, stand_in.PARENT))
    wait_until(lambda: told(told_file, "grandchild"))
    [(_, pid), (_, grandchild)] = told(told_file)

    os.kill(int(pid), signal.SIGKILL)

    assert 9 == worker.poll().detail["exit_signal"]
    wait_until(lambda: not alive(int(grandchild)))


def test_a_cell_that_ignores_sigterm_is_killed(a_worker, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "TERM_SECONDS", 0.1)

    outcome = outcome_of(a_worker(), a_job(tmp_path, stand_in.STUBBORN, timeout=0.5))

    assert "timeout" == outcome.status
    assert not alive(outcome.pid)


def test_jobs_run_side_by_side(a_worker, tmp_path):
    """A job that never ends does not hold up another."""
    worker = a_worker()
    worker.give(a_job(tmp_path, stand_in.ENDLESS))

    assert stand_in.FINE == outcome_of(worker, a_job(tmp_path)).job.cell.seed
    assert 1 == worker.running


def test_the_end_of_the_runner_ends_every_cell(a_worker, tmp_path, told_file):
    """At the end of its stdin the worker kills what it has started, and goes."""
    worker = a_worker()
    worker.give(a_job(tmp_path, stand_in.PARENT))
    wait_until(lambda: told(told_file, "grandchild"))

    worker._process.stdin.close()

    assert 0 == worker._process.wait()
    assert not any(alive(int(pid)) for _, pid in told(told_file))


def test_close_ends_every_cell(a_worker, tmp_path, told_file):
    worker = a_worker()
    worker.give(a_job(tmp_path, stand_in.PARENT))
    wait_until(lambda: told(told_file, "grandchild"))

    worker.close()

    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(told_file)))
    assert 0 == worker.running


def test_a_worker_that_dies_is_replaced(a_worker, tmp_path):
    """Its job ends as `error` with what it printed; the next job has a new worker."""
    worker = a_worker(a_stub("dies"))

    for _ in range(2):
        outcome = outcome_of(worker, a_job(tmp_path))
        assert ("error", "WorkerDied") == (outcome.status, outcome.detail["type"])
        assert "something terrible" in outcome.detail["message"]


KILLED_BEFORE_IT_TELLS = """
import os, signal, sys
from pathlib import Path
from meftbench import worker

report = worker.Server._report

def killed(self, **event):
    if event["event"] == "started":
        Path(os.environ["PID_FILE"]).write_text(str(event["pid"]))
        os.kill(os.getpid(), signal.SIGKILL)
    report(self, **event)

worker.Server._report = killed
sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("ways", [(), ("--spawn",)], ids=["fork", "spawn"])
def test_a_worker_killed_before_it_tells_of_a_cell_leaves_none_behind(a_worker, tmp_path, told_file, ways):
    """Nobody else knows of the cell's process, so it must not begin."""
    command = (sys.executable, "-c", KILLED_BEFORE_IT_TELLS, *WORKER[3:], *ways)
    worker = a_worker(command, PID_FILE=str(tmp_path / "pid"))

    outcome = outcome_of(worker, a_job(tmp_path, stand_in.ENDLESS))

    assert "WorkerDied" == outcome.detail["type"]
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))
    assert [] == told(told_file)


def test_a_worker_that_is_killed_takes_its_cells_along(a_worker, tmp_path, told_file):
    worker = a_worker()
    worker.give(a_job(tmp_path, stand_in.ENDLESS))
    wait_until(lambda: told(told_file))

    os.kill(worker._process.pid, signal.SIGKILL)

    assert "WorkerDied" == worker.poll().detail["type"]
    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(told_file)))
    assert "ok" == outcome_of(worker, a_job(tmp_path)).status


def test_a_worker_that_hangs_is_killed(a_worker, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "START_SECONDS", 0.2)

    outcome = outcome_of(a_worker(a_stub("silent")), a_job(tmp_path))

    assert ("error", "WorkerDied") == (outcome.status, outcome.detail["type"])


@pytest.mark.parametrize("manner", ["unfinished", "other-keys", "other-status", "no-result"])
def test_a_result_that_is_none_is_an_error(a_worker, tmp_path, manner):
    """Torn, foreign or missing results do not end the sweep."""
    outcome = outcome_of(a_worker(a_stub(manner)), a_job(tmp_path))

    assert ("error", "NoResult") == (outcome.status, outcome.detail["type"])


def test_garbage_between_events_is_passed_over(a_worker, tmp_path):
    """Lines that are no events, and events of jobs that nobody gave, are ignored."""
    worker = a_worker(a_stub("well"))

    assert {"manner": "well"} == worker.facts
    assert "ok" == outcome_of(worker, a_job(tmp_path)).status


@pytest.mark.parametrize(("manner", "said"), [("broken", "no torch"), ("dies-early", "libtorch.so: cannot open")])
def test_a_worker_that_cannot_start_is_one_line(a_worker, manner, said):
    with pytest.raises(UserError, match=said):
        a_worker(a_stub(manner))


def test_an_import_that_fails_is_one_line(a_worker):
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named 'nowhere'"):
        a_worker((sys.executable, "-m", "meftbench.worker", "--requests", "nowhere"))


@pytest.mark.parametrize(
    ("allocator", "expected"),
    [
        ("default", None),
        ("expandable", "expandable_segments:True"),
        ({"max_split_size_mb": 128}, "max_split_size_mb:128"),
    ],
)
def test_the_allocator_is_the_protocols_and_not_the_shells(allocator, expected):
    """It is never inherited, under its new name or its old one."""
    shell = {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:2", "HF_HUB_OFFLINE": "1"}

    environment = worker_environment(Protocol(allocator=allocator), 3, shell)

    assert expected == environment.get("PYTORCH_ALLOC_CONF")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert ("1", "3", "false") == tuple(
        environment[name] for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    )


@pytest.mark.parametrize(("shell", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_leave_the_cores_to_others(shell, expected):
    """Unless the user has said otherwise."""
    assert expected == worker_environment(Protocol(), 2, shell)["OMP_WAIT_POLICY"]
