"""Long tables are printed as lines, as rich would draw them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from builders import a_run, a_sweep
from meftbench.records.store import load_run
from meftbench.report.render import text_tables
from meftbench.report.render.terminal import print_summary
from meftbench.report.render.text_tables import TextTable

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def lines_of(show, width):
    """What `show` prints on a console of this width, without trailing spaces."""
    console = Console(file=io.StringIO(), width=width)
    show(console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("name", ["minilm-cpu", "smollm2-cpu", "best-levers", "exact-tradeoff-cpu"])
@pytest.mark.parametrize("width", [40, 80, 150])
def test_committed_runs_look_the_same_either_way(monkeypatch, name, width):
    """Headings, folded labels, gaps and captions, whatever the width of the terminal."""
    run = load_run(REPORTS / name)
    drawn = lines_of(lambda console: print_summary(run, console), width)

    monkeypatch.setattr(text_tables, "LONG", 0)

    assert drawn == lines_of(lambda console: print_summary(run, console), width)


TEXTS = st.text("abc=,", min_size=1, max_size=30)


@given(
    firsts=st.lists(TEXTS, min_size=1, max_size=5),
    numbers=st.lists(st.text("0123456789", max_size=8), min_size=5, max_size=5),
    first_width=st.integers(8, 20),
    gap=st.integers(1, 2),
)
def test_any_table_looks_the_same_either_way(firsts, numbers, first_width, gap):
    """A label that is too long is folded at the same place."""
    rows = [["8 × 128"], *([first, *numbers[:2]] for first in firsts)]
    least = first_width + 2 * (gap + 8)
    table = TextTable(["batch ×\nmethod", "peak\nMiB", "step"], rows, gap, first_width, least, "")

    assert lines_of(table.print_drawn, 60) == lines_of(table.print_lines, 60)


def test_a_run_of_many_cells_is_printed_whole(tmp_path):
    """Every row of 400 is there."""
    run = a_run(tmp_path / "run", *a_sweep(["full", "lora"], tuple(range(1, 201)), (128,)))

    lines = lines_of(lambda console: print_summary(run, console), 100)

    assert 200 == sum(line.strip().startswith("lora") for line in lines)
    assert "400 cells: 400 ok" in lines
