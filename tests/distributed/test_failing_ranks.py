"""However a rank of a distributed cell ends, the cell ends with its reason, and no process is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_ranks import a_cell

from meftbench.errors import CellFailure, UserError
from meftbench.measuring import ranks
from meftbench.measuring.passes import Measured
from meftbench.measuring.ranks import RankFailed, run_ranks
from meftbench.plan.protocol import Protocol
from meftbench.records.record import Metric
from meftbench.runner.job import Job
from meftbench.runner.process import Worker
from meftbench.worker import failure
from sweeps import alive, told, wait_until

CELL = a_cell("bert-tiny@random", "full", "ddp")


@pytest.fixture
def ranks_do(monkeypatch, tmp_path):
    """Run the cell with ranks that each do something else in place of the passes; afterwards none is alive."""
    file = tmp_path / "told.txt"

    def run(*acts):
        def passes(_cell, _protocol, _device, _reading, rank):
            with file.open("a") as stream:
                stream.write(f"rank {os.getpid()}\n")
            return acts[rank.number]()

        monkeypatch.setattr(ranks, "run_passes", passes)
        return run_ranks(CELL, Protocol(), "cpu")

    yield run
    assert len(told(file)) == 2
    assert not any(alive(int(pid)) for _, pid in told(file))


def wait_for_the_other():
    dist.all_reduce(torch.ones(1))
    raise AssertionError("the other rank has ended")


def raises(error):
    def act():
        raise error

    return act


def test_an_error_in_a_rank_is_the_cells(ranks_do):
    """The rank that raised it is named, not the one that waits for it; the traceback is that of the rank."""
    with pytest.raises(RankFailed, match=r"^rank 1: ZeroDivisionError: a bug") as failed:
        ranks_do(wait_for_the_other, raises(ZeroDivisionError("a bug")))

    content = failure(failed.value)
    assert "error" == content["status"]
    assert "test_failing_ranks.py" in content["status_detail"]["traceback"]


def test_a_rank_out_of_memory_is_a_result(ranks_do):
    with pytest.raises(CellFailure) as failed:
        ranks_do(raises(CellFailure("oom", message="no room", requested_bytes=4096)), wait_for_the_other)

    assert ("oom", 4096) == (failed.value.status, failed.value.detail["requested_bytes"])


def test_what_a_rank_refuses_is_said_in_one_line(ranks_do):
    with pytest.raises(UserError, match=r"^model: has no weights; download it$"):
        ranks_do(raises(UserError("model", "has no weights", "download it")), wait_for_the_other)


def test_a_rank_that_is_killed_ends_the_cell(ranks_do):
    with pytest.raises(CellFailure) as failed:
        ranks_do(lambda: os.kill(os.getpid(), signal.SIGKILL), wait_for_the_other)

    expected = {"type": "RankFailed", "message": "rank 0 was ended by SIGKILL", "exit_signal": 9}
    assert ("error", expected) == (failed.value.status, failed.value.detail)


def test_a_rank_that_hangs_ends_with_another(ranks_do):
    with pytest.raises(RankFailed, match=r"^rank 1 ended with exit code 3$"):
        ranks_do(lambda: time.sleep(600), lambda: os._exit(3))


def test_the_cells_numbers_are_of_the_largest_and_the_slowest_rank(ranks_do):
    """Tokens a second are those of all ranks."""

    def measured(peak, seconds):
        names = ("forward_s", "backward_s", "optimizer_s", "cpu_wait_share")
        times = {name: Metric(seconds, "measured") for name in ("step_time_s", *names)}
        rates = {name: Metric(60 / seconds, "measured") for name in ("tokens_per_s", "samples_per_s")}
        return lambda: Measured({"peak_allocated_bytes": Metric(peak, "counted"), **times, **rates}, {"of": peak})

    cell = ranks_do(measured(100, 2.0), measured(300, 1.5))

    assert [100, 300] == cell.metrics["peak_memory_by_rank"].value
    assert 300 == cell.metrics["peak_allocated_bytes"].value == cell.observed["of"]
    assert 2.0 == cell.metrics["step_time_s"].value
    assert 60.0 == cell.metrics["tokens_per_s"].value  # two ranks of 60 tokens in 2 seconds
    assert cell.metrics["host_rss_peak_bytes"].value > 0


def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(UserError, match="2 ranks take a GPU each, and 1 can be seen"):
        run_ranks(CELL, Protocol(), "cuda")


def test_ranks_that_hang_are_killed_at_the_cells_timeout(tmp_path):
    """They are in the process group of the cell."""
    file = tmp_path / "told.txt"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = (sys.executable, "-m", "meftbench.worker", "--requests", "hanging_requests")
    worker = Worker(dict(os.environ) | {"PYTHONPATH": path, "RANKS_TOLD": str(file)}, tmp_path / "worker.log", command)
    try:
        fields = {"cell": CELL, "repeat": 0, "protocol": Protocol(), "result": tmp_path / "r", "log": tmp_path / "l"}
        worker.give(Job(**fields, timeout=5.0))
        outcome = worker.poll()
    finally:
        worker.close()

    assert "timeout" == outcome.status
    assert len(told(file)) == 2
    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(file)))
