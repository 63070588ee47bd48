"""Benchmarks of sweeps of up to ten thousand cells that do nothing: what the harness takes for each."""

import subprocess
import sys

import pytest

from meftbench.plan.suite import load_suite
from sweeps import path_for_workers, sweep

SUITE = """schema: 1
name: many
protocol: {{warmup: 0, steps: 1, passes: [memory]}}
grid:
  model: bert-tiny@random
  device: counted
  method: [full, lora]
  batch_size: {sizes}
  sequence_length: 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the benchmarks below find the run of ten thousand cells."""
    return tmp_path_factory.mktemp("many")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cells", [250, 1000, 10_000])
def test_a_sweep_of_many_cells(benchmark, folder, monkeypatch, cells):
    """Milliseconds a cell, of fork, result, record and fsync, are in `extra_info`: the same for few and for many."""
    monkeypatch.setenv("PYTHONPATH", path_for_workers())
    file = folder / f"{cells}.yaml"
    file.write_text(SUITE.format(sizes=list(range(1, cells // 2 + 1))))

    run = benchmark.pedantic(sweep, (load_suite(str(file)), folder / str(cells)), rounds=1)

    benchmark.extra_info["ms_a_cell"] = benchmark.stats.stats.mean / cells * 1000
    assert cells == len(run.records)


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_a_list_of_many_cells_of_a_packaged_model(benchmark, folder, model):
    """Benchmark a whole process that lists cells of a model whose weights are in a Python package."""
    file = folder / f"{model}.yaml"
    file.write_text(SUITE.format(sizes=list(range(1, 5001))).replace("bert-tiny@random", f"{model}@random"))
    command = [sys.executable, "-m", "meftbench", "run", str(file), "--dry-run"]

    ended = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "text": True}, rounds=2)

    assert "10000 cells" in ended.stdout, ended.stderr


@pytest.mark.parametrize("options", [["--dry-run"], ["--resume", "-q"]])
def test_a_command_on_a_suite_of_many_cells(benchmark, folder, options):
    """Benchmark a whole process that lists the cells, with the time that they took, and one that finds all finished."""
    if not (folder / "10000" / "records.jsonl").exists():
        pytest.skip("needs the run of the benchmark above")
    out = [] if "--dry-run" in options else ["--out", str(folder / "10000")]
    command = [sys.executable, "-m", "meftbench", "run", str(folder / "10000.yaml"), *out, *options]

    (folder / "runs").mkdir(exist_ok=True)
    if not (folder / "runs" / "earlier").exists():
        (folder / "runs" / "earlier").symlink_to(folder / "10000")
    captured = {"capture_output": True, "text": True, "cwd": folder}
    ended = benchmark.pedantic(subprocess.run, (command,), captured, rounds=2)

    assert 0 == ended.returncode, ended.stderr
    assert "10000 cells" in ended.stdout
