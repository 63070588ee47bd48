"""What a run still lacks of its suite is said wherever the run is, with the command that runs it."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builders import a_cell, a_record, a_run
from meftbench.records.store import Run, load_run
from meftbench.report.views.not_run import cells_not_run, not_run, to_go_on
from meftbench.runner.folder import described
from meftbench.runner.schedule import Plan, pending
from stand_in import BROKEN, FINE
from sweeps import a_suite

GRID = {"model": "bert-tiny@random", "method": ["full", "lora"], "batch_size": [1, 2], "sequence_length": 16}


def a_file(name="toy.yaml", **grid):
    """A suite of 4 cells, unless `grid` changes that."""
    content = {"schema": 1, "name": "toy", "budgets": "toy.budgets.yaml", "protocol": {"on_oom": "record"}}
    Path(name).write_text(yaml.safe_dump(content | {"grid": GRID | grid}))
    budget = {"match": "*", "metric": "activation_peak_bytes", "max": "1GiB"}
    Path("toy.budgets.yaml").write_text(yaml.safe_dump({"schema": 1, "budgets": [budget]}))
    return name


@pytest.fixture
def begun(cli):
    """A run of 4 cells, twice each, of which one cell was run; what was printed, and what is said of it."""
    command = "meftbench run toy.yaml --device counted --repeats 2 --out a --resume"
    return cli("run", a_file(), "--out", "a", "--limit", 1, "--repeats", 2)[1], command


def in_one_line(text):
    """Without the line ends of a terminal of 80 columns."""
    return " ".join(text.split())


def test_what_was_not_run_is_said_wherever_the_run_is(cli, begun):
    """By the run itself, and by all that reads it, with the command that runs the rest; the exit codes are as ever."""
    printed, command = begun
    said = f"3 of 4 cells not run yet: `{command}`"

    assert 0 == cli("report", "a")[0]
    shown = [cli("show", "a")[1], Path("a/table.md").read_text().replace("\\", ""), Path("a/report.html").read_text()]
    for text in (printed, *shown):
        assert said in in_one_line(text)
        assert not re.search("the cell ended ok|all . cells ended ok", text)
    code, out, err = cli("check", "a")
    assert (0, f"note: 3 of 4 cells not run yet, and not checked: `{command}`\n") == (code, err)
    assert out.startswith("1 verdict: 1 held")


def test_the_command_that_is_said_runs_the_rest(cli, begun):
    """And then nothing is said any more."""
    code, out, err = cli(*shlex.split(begun[1])[1:])

    assert (0, 8) == (code, len(load_run("a").records))
    assert "4 cells: 4 ok\n" in out
    assert "not run" not in out + err + cli("show", "a")[1] + cli("check", "a")[2]


def test_missing_repeats_are_said(cli, begun):
    """Of a run that was killed in its second round."""
    cli(*shlex.split(begun[1])[1:])
    lines = Path("a/records.jsonl").read_text().splitlines(keepends=True)
    Path("a/records.jsonl").write_text("".join(lines[:-1]))

    _, out, _ = cli("show", "a")

    assert "4 cells: 4 ok; 1 repeat of cells not run yet: `meftbench run" in in_one_line(out)


@pytest.mark.parametrize("cells", [None, [], "absent"])
def test_a_run_that_lists_no_cells_lacks_none(tmp_path, cells):
    """As those of earlier versions, or made by hand."""
    suite = {} if cells == "absent" else {"cells": cells}

    assert (0, 0) == cells_not_run(run := a_run(tmp_path / "run", a_record(), **suite))
    assert "" == not_run(run)
    assert "meftbench run toy --out" in to_go_on(run)


@given(st.integers(1, 6), st.integers(1, 3), st.data())
def test_what_is_left_is_what_a_sweep_would_run(cells, repeats, data):
    """Of any cells and repeats, whichever have ended."""
    suite = a_suite(*(a_cell(batch_size=size) for size in range(1, cells + 1)), repeats=repeats)
    keys = [(cell, repeat) for cell in suite.cells for repeat in range(repeats)]
    ended = data.draw(st.lists(st.sampled_from(keys), unique_by=lambda key: (key[0].cell_id, key[1])))
    records = [a_record(batch_size=cell.batch_size, repeat=repeat) for cell, repeat in ended]
    run = Run(Path("a"), described(suite) | {"run_id": "run-1"}, {}, records)
    plan = Plan(suite.cells, {cell.cell_id: repeats for cell in suite.cells})

    left = pending(plan, {(record.cell_id, record.repeat): record.status for record in records})

    missing, every = cells_not_run(run)
    (of_others,) = re.findall(r"(\d+) repeats? of cells", not_run(run)) or [0]
    assert cells == every
    assert len(left) == missing * repeats + int(of_others)
    assert bool(left) == bool(not_run(run))


def test_a_run_in_which_nothing_was_left_says_so(cli):
    """And how cells that failed are tried again."""
    a_file("mixed.yaml", batch_size=1, seed=[FINE, BROKEN])
    cli("run", "mixed.yaml", "--out", "b", "--where", f"seed={FINE}")
    cli("run", "mixed.yaml", "--out", "b", "--resume")

    code, _, err = cli("run", "mixed.yaml", "--out", "b", "--resume", "-q")

    again = "meftbench run mixed.yaml --device counted --out b --resume --retry error"
    assert (3, f"note: nothing was left to run; `{again}` tries again what ended in error\n") == (code, err)
    assert 3 == cli(*shlex.split(again)[1:])[0]
    code, _, err = cli("run", "mixed.yaml", "--out", "b", "--resume", "-q", "--json")
    assert err.startswith("note: nothing was left to run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "full", "batch_size": 1}, "1 cell, 1 process; nothing was run\n"),
        ({"method": "full"}, "2 cells, 2 processes; nothing was run\n"),
    ],
)
def test_a_dry_run_counts_in_words_that_fit(cli, changes, said):
    assert said in cli("run", a_file(**changes), "--dry-run")[1]
