"""Benchmarks of the harness: what a cell costs beyond what it does, and what reading a run costs."""

import pytest

from builders import a_cell, a_record
from meftbench.plan.suite import Suite
from meftbench.records.store import load_run
from meftbench.records.writer import writing
from meftbench.runner import run_suite
from meftbench.runner.schedule import Plan, Schedule
from sweeps import a_suite, path_for_workers, sweep


def test_overhead_of_a_cell(benchmark, tmp_path, monkeypatch):
    """Benchmark the wall time of a cell minus its build and its passes, on a real model; in `extra_info`."""
    cells = [a_cell(model="bert-tiny@random", batch_size=size, sequence_length=16) for size in (1, 2, 3, 4)]
    suite = a_suite(*cells, warmup=1, steps=1, passes=["memory"])

    run = benchmark.pedantic(run_suite, (suite, tmp_path / "run"), rounds=1)

    assert ["ok"] * 4 == [record.status for record in run.records]
    overheads = [r.wall_s - r.value("build_s") - r.value("passes_s") for r in run.records]
    benchmark.extra_info["overhead_s_per_cell"] = overheads


def test_a_sweep_of_cells_that_do_nothing(benchmark, tmp_path, monkeypatch):
    """Benchmark 50 cells of the stand-in: fork, result, record, fsync."""
    monkeypatch.setenv("PYTHONPATH", path_for_workers())
    suite: Suite = a_suite(*(a_cell(batch_size=size) for size in range(1, 51)))

    run = benchmark.pedantic(sweep, (suite, tmp_path / "run"), rounds=1)

    assert 50 == len(run.records)


@pytest.mark.parametrize("cells", [100, 10_000])
def test_choosing_the_next_cell(benchmark, cells):
    """Benchmark all decisions of a sweep: their time grows with the number of cells."""
    chosen = [a_cell(batch_size=n + 1) for n in range(cells)]

    def decided():
        schedule, order = Schedule(Plan(chosen, {cell.cell_id: 1 for cell in chosen}, "bracket"), {}), []
        while (attempt := schedule.start()) is not None:
            schedule.end(attempt.key, "ok")
            order.append(attempt.cell)
        return order

    assert chosen == benchmark.pedantic(decided, rounds=2)


@pytest.mark.parametrize("cells", [100, 10_000])
def test_reading_a_run(benchmark, tmp_path, cells):
    """Benchmark load_run on a folder of finished records."""
    with writing(tmp_path) as writer:
        lines = [a_record(batch_size=n + 1, metrics={"activation_peak_bytes": n}) for n in range(cells)]
        writer.write("suite.yaml", "name: toy\nrun_id: r\n")
        writer.write("environment.json", "{}")
        for record in lines:
            writer.append(record)

    assert cells == len(benchmark(load_run, tmp_path).records)
