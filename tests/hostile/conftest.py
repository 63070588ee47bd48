"""Counts what readers met: in the long profile a table of readers is printed, and written where that is asked for.

MEFTBENCH_HOSTILE=1000 MEFTBENCH_HOSTILE_OUT=reports/hostile pytest -n1 tests/hostile
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

import mutations
from meftbench.records.store import made, write_whole
from meftbench.report.render.verdicts import markdown_table
from meftbench.runner import gpus
from meftbench.runner.environment import environment

OUT = "MEFTBENCH_HOSTILE_OUT"  # variable: the folder to write to; readers of earlier runs stay in its table
COLUMNS = ("reader", "inputs", "refused", "slowest_s", "faults")
PROPERTY = "hostile"


def pytest_configure(config):
    config.addinivalue_line("markers", "reader(name): what the mutated inputs of the test are read by")


@pytest.fixture(autouse=True)
def _nothing_seen_yet():
    mutations.seen = mutations.Seen()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The report of a test has what its inputs did, and takes it to the process that prints the table."""
    marker = item.get_closest_marker("reader")
    if marker is not None and call.when == "call" and mutations.LONG:
        seen = mutations.seen
        item.user_properties.append((PROPERTY, [marker.args[0], seen.inputs, seen.refused, seen.slowest_s]))
    return (yield)


def pytest_terminal_summary(terminalreporter):
    """The table of readers. faults: tests that failed, each by the first input with a fault, which hypothesis shows."""
    readers = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in report.user_properties:
                if key == PROPERTY:
                    _add(readers, value, outcome == "failed")
    if not readers:
        return
    if out := os.environ.get(OUT):
        readers = _earlier(Path(out)) | readers
        _write(Path(out), readers)
    for line in _table(readers).splitlines():
        terminalreporter.write_line(line)


def _add(readers, value, failed):
    name, inputs, refused, slowest_s = value
    row = readers.setdefault(name, {"reader": name, "inputs": 0, "refused": 0, "slowest_s": 0.0, "faults": 0})
    row["inputs"] += inputs
    row["refused"] += refused
    row["slowest_s"] = round(max(row["slowest_s"], slowest_s), 2)
    row["faults"] += failed


def _earlier(folder):
    file = folder / "readers.csv"
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as stream:
        return {row["reader"]: row for row in csv.DictReader(stream)}


def _table(readers):
    head = ("reader", "mutated inputs", "refused in one line", "slowest (CPU s)", "faults")
    rows = [tuple(str(readers[name][column]) for column in COLUMNS) for name in sorted(readers)]
    return markdown_table(head, rows)


def _write(folder, readers):
    made(folder)
    with (folder / "readers.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(readers[name] for name in sorted(readers))
    text = (
        "Mutated inputs by reader. A fault is a traceback, more than "
        f"{mutations.SLOWEST_S:g} CPU seconds beyond those of sound input, a write outside the folder of the test, a "
        "process that was started, a connection, or code that was run. Inputs that were not refused were read as they "
        "are. Made by `MEFTBENCH_HOSTILE=1000 MEFTBENCH_HOSTILE_OUT=reports/hostile pytest -n1 tests/hostile`."
    )
    write_whole(folder / "table.md", f"{text}\n\n{_table(readers)}\n")
    write_whole(folder / "environment.json", json.dumps(environment(gpus.read(), {}), indent=1) + "\n")
