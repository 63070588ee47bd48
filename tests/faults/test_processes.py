"""Cells that die, hang, print, allocate or leave processes behind: each has an outcome, and nothing is left."""

import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta

import faulty
import pytest
from faulty import BLOCKED, EXHAUSTED, GREEDY, LEAVING, PRINTING, SIGNALLED, WITHOUT_WORKER, WORKERS

from builders import a_cell
from long_profile import many_minutes
from meftbench.errors import UserError
from meftbench.kept_output import ROOM
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.records import writer as writing_records
from meftbench.runner import Noted, process, run_suite
from meftbench.runner import oom_kills as kills
from meftbench.runner.job import Job
from meftbench.runner.logs import end_of
from stand_in import BRIEF, ENDLESS, FINE, KILLED
from sweeps import WORKER, a_suite, alive, does, statuses, sweep, told, wait_until

FAULTY = (*WORKER[:-1], "faulty")
NOT_DEADLY = {
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,  # ignored
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,  # stopped
}  # fmt: skip
DEADLY = sorted(number for number in signal.valid_signals() if number < 32 and number not in NOT_DEADLY)


def test_a_cell_that_dies_by_any_signal_is_an_error_with_its_number(tmp_path, told_file):
    """And the cells after it run; SIGKILL too, because the kernel has not counted a kill for memory."""
    suite = a_suite(*does(*(SIGNALLED + number for number in DEADLY), FINE))

    run = sweep(suite, tmp_path / "run", command=FAULTY)

    assert len(DEADLY) >= 20
    assert ["error"] * len(DEADLY) + ["ok"] == statuses(run)
    assert DEADLY == [record.status_detail["exit_signal"] for record in run.records[:-1]]
    assert not any(alive(int(pid)) for _, pid in told(told_file))


@pytest.mark.parametrize(("before", "ending"), [(1, ["ok", "ok"]), (0, ["error", "ok"])])
def test_a_cell_whose_worker_is_killed_is_run_once_more(tmp_path, monkeypatch, before, ending):
    """And recorded as an error when it loses its worker again. It is the same on clusters.

    before: workers, of two in all, that were killed before the run."""
    (killed := tmp_path / "killed").write_text("x" * before)
    monkeypatch.setenv(WORKERS, str(killed))
    suite, events = a_suite(*does(WITHOUT_WORKER, FINE)), []

    run = sweep(suite, tmp_path / "run", command=FAULTY, on_event=events.append)

    assert ending == statuses(run)
    detail = run.records[0].status_detail
    again = f"{suite.cells[0].label}: {detail['retried_after']['message']}; it is run again"
    assert ("WorkerDied", [again]) == (
        detail["retried_after"]["type"],
        [event.text for event in events if isinstance(event, Noted)],
    )
    assert (None if before else "WorkerDied") == detail.get("type")
    assert 2 == len(killed.read_text())


def test_a_cell_that_is_stopped_ends_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "TERM_SECONDS", 0.1)

    run = sweep(a_suite(*does(SIGNALLED + signal.SIGSTOP, FINE), timeout=0.5), tmp_path / "run", command=FAULTY)

    assert ["timeout", "ok"] == statuses(run)


def test_a_cell_that_hangs_in_c_code_is_killed(tmp_path, monkeypatch):
    """It blocks every signal that can be blocked."""
    monkeypatch.setattr(process, "TERM_SECONDS", 0.1)

    run = sweep(a_suite(*does(BLOCKED, FINE), timeout=0.5), tmp_path / "run", command=FAULTY)

    assert ["timeout", "ok"] == statuses(run)
    assert not alive(run.records[0].worker_pid)


def test_a_cell_that_allocates_without_end_is_out_of_memory(tmp_path, monkeypatch):
    """By its limit, before the kernel has to kill anything."""
    monkeypatch.setattr("meftbench.runner.host.available_bytes", lambda: 2**28)

    run = sweep(a_suite(*does(GREEDY, FINE)), tmp_path / "run", command=FAULTY)

    assert ["oom", "ok"] == statuses(run)
    assert "MemoryError" == run.records[0].status_detail["type"]


def test_a_cell_that_has_left_no_memory_for_its_error_is_out_of_memory(tmp_path, monkeypatch):
    """The limit holds for what is measured, and not for what reports that it failed."""
    monkeypatch.setattr("meftbench.runner.host.available_bytes", lambda: 2**26)

    run = sweep(a_suite(*does(EXHAUSTED, FINE)), tmp_path / "run", command=FAULTY)

    assert ["oom", "ok"] == statuses(run)


@many_minutes
@pytest.mark.parametrize("threads", [1, 2])
def test_real_cells_in_any_little_memory_are_out_of_memory(tmp_path, threads):
    """While they are built, as threads begin, and in their steps; an error only where C++ ends the process for it."""
    protocol = Protocol(warmup=1, steps=1, passes=("memory",))
    cell = Cell.of(model="bert-tiny@random", method="lora+checkpoint", batch_size=64, sequence_length=128)
    worker = process.Worker(process.worker_environment(protocol, threads, os.environ), tmp_path / "worker.log")
    found = []
    for mib in (1, 12, 16, 17, 18, 19, 20, 24, 28, 32, 36, 64, 150, 4000):
        job = Job(cell, 0, protocol, tmp_path / "a.json", tmp_path / "a.log", 200, threads, memory_bytes=mib * 2**20)
        worker.give(job)
        outcome = worker.poll()
        aborted = outcome.detail.get("exit_signal") == signal.SIGABRT
        found.append((mib, "oom" if aborted else outcome.status))
    worker.close()

    assert {"oom"} == {status for _, status in found[:-1]}, found
    assert (4000, "ok") == found[-1]


def printed(tmp_path, monkeypatch, size):
    monkeypatch.setenv(faulty.PRINTED, str(size))
    run = sweep(a_suite(*does(PRINTING, FINE)), tmp_path / "run", command=FAULTY)
    assert ["ok", "ok"] == statuses(run)
    [log] = (run.path / "logs").iterdir()
    assert ROOM == log.stat().st_size
    assert end_of(log).endswith("the end")


def test_a_cell_that_prints_much_leaves_the_end_of_it(tmp_path, monkeypatch):
    printed(tmp_path, monkeypatch, 2**24)


def test_a_cell_that_prints_more_than_the_disk_holds_does_not_fill_it(small_disk, monkeypatch):
    """What it prints is cut while it runs, and not only when it has ended."""
    monkeypatch.setenv(faulty.PRINTED, str(2**24))
    disk = small_disk(4 * 2**10)

    run = sweep(a_suite(*does(PRINTING, FINE)), disk / "run", command=FAULTY)

    assert ["ok", "ok"] == statuses(run)
    [log] = (run.path / "logs").iterdir()
    assert end_of(log).endswith("the end")


@pytest.mark.slow
def test_a_cell_that_prints_a_gigabyte(tmp_path, monkeypatch):
    printed(tmp_path, monkeypatch, 2**30)


def test_what_a_cell_leaves_running_is_ended(tmp_path, told_file):
    run = sweep(a_suite(*does(LEAVING, FINE)), tmp_path / "run", command=FAULTY)

    assert ["ok", "ok"] == statuses(run)
    [(_, child)] = told(told_file, "left")
    wait_until(lambda: not alive(int(child)))


# --- who sent SIGKILL ---


def test_a_cell_that_somebody_kills_is_an_error_and_larger_cells_run(tmp_path, told_file):
    """Only the kernel's own count says that memory ran out."""
    suite = a_suite(a_cell(batch_size=1, seed=ENDLESS), a_cell(batch_size=2, seed=ENDLESS), on_oom="skip-larger")

    def kill():
        for number in (1, 2):
            wait_until(lambda number=number: len(told(told_file)) >= number)
            os.kill(int(told(told_file)[number - 1][1]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    run = sweep(suite, tmp_path / "run")

    assert ["error", "error"] == statuses(run)
    assert {"was killed by SIGKILL, not by the kernel for memory", "was killed by SIGKILL; this system does not tell "
            "whether for memory"} >= {record.status_detail["message"] for record in run.records}  # fmt: skip


@pytest.fixture
def counts(tmp_path, monkeypatch):
    """The files in which a kernel counts its kills for memory, at 3, and a function that sets one of them."""
    root, proc = tmp_path / "cgroup", tmp_path / "proc"

    def files(name):
        return {
            "v2": root / "pod" / "memory.events",
            "v1": root / "memory" / "memory.oom_control",
            "system": proc / "vmstat",
        }[name]

    def count(name, number):
        files(name).parent.mkdir(parents=True, exist_ok=True)
        files(name).write_text(f"low 0\noom 7\noom_kill {number}\noom_group_kill 0\n")

    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/kubepods/a:b\n0::/pod\n")
    root.mkdir()
    real = kills.oom_kills
    for module in (kills, process):
        monkeypatch.setattr(module, "oom_kills", lambda: real(root, proc))
    return count


@pytest.mark.parametrize("name", ["v1", "v2", "system"])
def test_a_kill_that_the_kernel_has_counted_is_out_of_memory(tmp_path, counts, name, monkeypatch):
    """It is the evidence for one process only: another that dies in the same way, later, has no part in it."""
    counts(name, 3)
    read = process.read_result
    monkeypatch.setattr(process, "read_result", lambda file: counts(name, 4) or read(file))

    run = sweep(a_suite(*does(KILLED, KILLED)), tmp_path / "run")

    assert ["oom", "error"] == statuses(run)
    assert (
        "killed by the kernel because the memory of the host, or of its container, ran out"
        == (run.records[0].status_detail["message"])
    )


@pytest.mark.parametrize(("kills", "status"), [(3, "error"), (4, "oom")])
def test_a_rank_that_the_kernel_has_killed_is_out_of_memory(tmp_path, counts, kills, status, monkeypatch):
    """As a cell of one process is; the cell's own process lives on, and leaves a result."""
    counts("v2", 3)
    detail = {"type": "RankFailed", "message": "rank 1 was ended by SIGKILL", "exit_signal": 9}

    def read(file):
        counts("v2", kills)
        return {"status": "error", "status_detail": detail, "metrics": {}, "observed": {}}

    monkeypatch.setattr(process, "read_result", read)

    [record] = sweep(a_suite(), tmp_path / "run").records

    assert (status, 9) == (record.status, record.status_detail["exit_signal"])
    assert (detail == record.status_detail) == (status == "error")


def test_a_kill_in_another_cgroup_is_no_evidence(tmp_path, counts, monkeypatch):
    """Where the own cgroup counts, the number of the whole system says nothing of this process."""
    counts("v2", 3)
    read = process.read_result
    monkeypatch.setattr(process, "read_result", lambda file: counts("system", 9) or read(file))

    assert ["error"] == statuses(sweep(a_suite(*does(KILLED)), tmp_path / "run"))


def test_one_kill_explains_one_of_two_cells_that_run_side_by_side(tmp_path, counts, told_file):
    """Both are killed, the kernel counts one."""
    counts("v2", 3)

    def kill():
        wait_until(lambda: len(told(told_file)) == 2)
        counts("v2", 4)
        for _, pid in told(told_file):
            os.kill(int(pid), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    run = sweep(a_suite(*does(ENDLESS, ENDLESS)), tmp_path / "run", jobs=2)

    assert ["error", "oom"] == sorted(statuses(run))


def test_where_nothing_is_counted_a_kill_is_an_error(tmp_path, counts):
    run = sweep(a_suite(*does(KILLED)), tmp_path / "run")

    assert ("error", "was killed by SIGKILL; this system does not tell whether for memory") == (
        run.records[0].status,
        run.records[0].status_detail["message"],
    )


# --- clocks and slow disks ---


def test_durations_do_not_follow_a_clock_that_is_set_back(tmp_path, monkeypatch):
    """The clock goes back by an hour between any two looks at it."""

    class Clock(datetime):
        looks = 0

        @classmethod
        def now(cls, tz=None):
            cls.looks += 1
            return datetime(2026, 1, 1, tzinfo=UTC) - timedelta(hours=cls.looks)

    monkeypatch.setattr(process, "datetime", Clock)
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * Clock.looks)

    run = sweep(a_suite(*does(BRIEF, BRIEF, ENDLESS), timeout=0.5), tmp_path / "run")

    assert ["ok", "ok", "timeout"] == statuses(run)
    for record in run.records:
        took = datetime.fromisoformat(record.finished_at) - datetime.fromisoformat(record.started_at)
        assert abs(took.total_seconds() - record.wall_s) <= 0.001
        assert 0 < record.wall_s < 30


def test_a_slow_disk_takes_no_time_from_cells(tmp_path, monkeypatch):
    """While a record is synced for longer than cells may take, cells end in time."""
    sync = os.fsync
    monkeypatch.setattr(writing_records.os, "fsync", lambda descriptor: time.sleep(0.6) or sync(descriptor))

    run = sweep(a_suite(*does(*[BRIEF] * 3), timeout=0.5), tmp_path / "run", jobs=2)

    assert ["ok"] * 3 == statuses(run)


def test_a_second_runner_is_refused_and_changes_nothing(tmp_path):
    """In one line, at any moment of the first; the first ends as if there had been none."""
    suite = a_suite(*does(*[BRIEF] * 4))
    refused = []

    def begin_another(event):
        with pytest.raises(UserError, match="another run writes here; wait for it, or choose another --out") as raised:
            run_suite(suite, tmp_path / "run", command=WORKER, resume=True)
        refused.append(raised.value.exit_code)

    run = sweep(suite, tmp_path / "run", on_event=begin_another)

    assert ["ok"] * 4 == statuses(run)
    assert {2} == {*refused}
    assert 9 == len(refused)
