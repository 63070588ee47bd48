"""Benchmarks of what reads runs of ten thousand cells: whole processes, and the steps that take most of their time."""

import csv
import io
import resource
import shutil
import subprocess
import sys

import pytest

from large_runs import a_large_run
from meftbench.plan.budgets import load_budgets
from meftbench.records.store import load_run
from meftbench.report.results import frame_of
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


@pytest.mark.parametrize("command", ["compare", "check", "show", "export"])
def test_a_command_on_a_large_run(benchmark, runs, command):
    """Benchmark a whole process, from the start of the interpreter to its end."""
    first, second, budgets = runs
    arguments = {
        "compare": [first, second],
        "check": [first, "--budget", budgets],
        "show": [first],
        "export": [first, "--format", "csv"],
    }[command]

    ended = benchmark.pedantic(
        subprocess.run,
        ([sys.executable, "-m", "meftbench", command, *map(str, arguments)],),
        {"capture_output": True, "text": True},
        rounds=3,
    )

    assert 0 == ended.returncode
    said = {"compare": "10000 cells in both runs: 100 worse", "check": "20000 verdicts: 20000 held", "show": "10000 ok"}
    if command == "export":
        assert 1 + CELLS == len(list(csv.reader(io.StringIO(ended.stdout))))
    else:
        assert said[command] in ended.stdout


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """Where the benchmark below writes the page of a large run."""
    return tmp_path_factory.mktemp("page") / "report.html"


def test_a_page_of_a_large_run(benchmark, runs, page):
    """Benchmark the whole process that writes it; its peak memory and the size of the page are in `extra_info`."""
    command = [sys.executable, "-m", "meftbench", "report", str(runs[0]), "--out", str(page.parent), "--format", "html"]

    benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "check": True}, rounds=2)

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    benchmark.extra_info |= {"peak_rss_bytes": peak, "page_bytes": page.stat().st_size}
    assert 2**30 > peak
    assert 15 * 2**20 > page.stat().st_size


def test_opening_a_page_of_a_large_run(benchmark, page):
    """Benchmark Chromium from the file to a page that can be used; the longest task (ms) is in `extra_info`."""
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None or not page.exists():
        pytest.skip("needs Chromium, and the page of the benchmark above")
    observe = """window.tasks = []; new PerformanceObserver(list => list.getEntries().forEach(each =>
        tasks.push(each.duration))).observe({ type: "longtask", buffered: true });"""
    with playwright.sync_playwright() as started:
        tab = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        tab.add_init_script(observe)

        def opened():
            tab.goto(page.as_uri())
            tab.wait_for_function("document.documentElement.dataset.ready === 'yes'")

        benchmark.pedantic(opened, rounds=2)
        benchmark.extra_info["longest_task_ms"] = tab.evaluate("Math.max(0, ...tasks)")
        assert f"{CELLS:,} cells" in tab.locator("#table-steps [role=status]").inner_text()


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
