"""Real cells through the real worker, on the smallest model."""

import os
from pathlib import Path

import pytest

from builders import a_cell
from meftbench.records.store import load_run
from meftbench.runner import run_suite
from meftbench.runner.process import Worker, worker_environment
from sweeps import a_suite, statuses


def a_tiny(**fields):
    return a_cell(**({"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16} | fields))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Cells that fit, one that no host can hold, one whose model is damaged, and the first once more."""
    damaged = tmp_path_factory.mktemp("model")
    (damaged / "config.json").write_text('{"model_type": "bert", "hidden_size": 7}')
    (damaged / "model.safetensors").write_bytes(b"not weights")
    cells = (
        a_tiny(),
        a_tiny(batch_size=2**31, sequence_length=512),
        a_tiny(model=str(damaged)),
        a_tiny(method="meft1"),
        a_tiny(method="lora+checkpoint"),
    )
    suite = a_suite(*cells, warmup=1, steps=1, repeats=2, passes=["memory"], threads=1)
    return run_suite(suite, tmp_path_factory.mktemp("runs") / "run")


def test_failures_are_results_and_the_cells_after_them_run(run):
    """Out of memory is told from an error, by the real allocator; the sweep ends with every cell recorded."""
    assert ["ok", "oom", "error", "ok", "ok"] * 2 == statuses(run)


def test_the_real_allocator_says_how_much_it_was_asked_for(run):
    assert run.records[1].status_detail["requested_bytes"] > 2**32


def test_two_fresh_processes_count_the_same_bytes(run):
    """A cell counted twice gives identical bytes, whatever ran between."""
    first, second = run.records[0], run.records[5]

    assert first.cell_id == second.cell_id
    assert first.worker_pid != second.worker_pid
    assert first.value("activation_peak_bytes") == second.value("activation_peak_bytes") > 0
    assert first.value("peak_allocated_bytes") == second.value("peak_allocated_bytes")


def test_the_run_reads_back(run):
    assert run == load_run(run.path)
    assert run.environment["torch"]["torch"] == run.environment["packages"]["torch"]


def test_a_worker_forks_before_it_has_threads_or_a_device(tmp_path):
    """A fork of a process with threads may hang, and of one that has initialised CUDA cannot use it."""
    suite = a_suite(a_tiny())
    worker = Worker(worker_environment(suite.protocol, 2, os.environ), tmp_path / "worker.log")
    try:
        assert 1 == len(os.listdir(f"/proc/{worker._process.pid}/task"))
        assert "/dev/nvidia" not in Path(f"/proc/{worker._process.pid}/maps").read_text()
    finally:
        worker.close()
