"""Benchmarks of what reads runs of ten thousand cells: whole processes, and the steps that take most of their time."""

import subprocess
import sys

import pytest

from large_runs import a_large_run
from meftbench.records.store import load_run
from meftbench.report.results import frame_of
from meftbench.verdicts.budgets import load_budgets
from meftbench.verdicts.compare import compare
from meftbench.verdicts.judge import judge

CELLS = 10_000
BUDGETS = """schema: 1
budgets:
  - {match: "*", metric: activation_peak_bytes, source: counted, max: 4GiB}
  - {match: "*", metric: peak_allocated_bytes, source: counted, max: 4GiB}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same cells, of which 100 have grown, and budgets that hold."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "budgets.yaml").write_text(BUDGETS)
    return a_large_run(folder / "a", CELLS), a_large_run(folder / "b", CELLS, grown=100), folder / "budgets.yaml"


@pytest.mark.parametrize("command", ["compare", "check", "show"])
def test_a_command_on_a_large_run(benchmark, runs, command):
    """Benchmark a whole process, from the start of the interpreter to its end."""
    first, second, budgets = runs
    arguments = {"compare": [first, second], "check": [first, "--budget", budgets], "show": [first]}[command]

    ended = benchmark.pedantic(
        subprocess.run,
        ([sys.executable, "-m", "meftbench", command, *map(str, arguments)],),
        {"capture_output": True, "text": True},
        rounds=3,
    )

    assert 0 == ended.returncode
    said = {"compare": "10000 cells in both runs: 100 worse", "check": "20000 verdicts: 20000 held", "show": "10000 ok"}
    assert said[command] in ended.stdout


def test_reading_a_large_run(benchmark, runs):
    """Benchmark load_run on 80 MB of records."""
    assert CELLS == len(benchmark.pedantic(load_run, (runs[0],), rounds=3).records)


def test_steps_on_a_large_run(benchmark, runs):
    """Benchmark comparing, judging and tabulating runs that were read."""
    first, second, budgets = load_run(runs[0]), load_run(runs[1]), load_budgets(runs[2])

    def steps():
        return compare(first, second), judge(first, budgets), frame_of(first)

    comparison, verdicts, frame = benchmark.pedantic(steps, rounds=2)

    assert 100 == comparison.counts()["worse"] == len(comparison.grown)
    assert 2 * CELLS == len(verdicts)
    assert CELLS == len(frame)
