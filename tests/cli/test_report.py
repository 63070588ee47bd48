"""`meftbench report`: which files it writes where."""

from __future__ import annotations

import errno
import os
import re

import pytest

from builders import a_record, a_run, a_sweep


@pytest.fixture
def run(tmp_path):
    return a_run(tmp_path / "run", *a_sweep(["full", "meft1"], (1,), (16, 32)))


def test_everything_goes_into_the_run(cli, run):
    """The files are named on stdout, the page first."""
    code, out, err = cli("report", run.path)

    assert (0, "") == (code, err)
    assert out.startswith(f"{run.path}/report.html\n")
    assert {"report.html", "plots", "table.csv", "table.md"} <= {file.name for file in run.path.iterdir()}


@pytest.mark.parametrize(("format_", "name"), [("csv", "table.csv"), ("md", "table.md")])
def test_one_format_is_one_file(cli, run, tmp_path, format_, name):
    """Elsewhere with --out."""
    code, out, _ = cli("report", run.path, "--format", format_, "--out", tmp_path / "new" / "folder")

    assert (0, f"{tmp_path}/new/folder/{name}\n") == (code, out)
    assert [name] == [file.name for file in (tmp_path / "new" / "folder").iterdir()]


def test_markdown_has_the_numbers_with_their_source(cli, run, tmp_path):
    """And says what was compared."""
    cli("report", run.path, "--format", "md")

    text = (run.path / "table.md").read_text()
    assert "Compared at equal batch, micro-batch and length." in text
    assert "9.59 (counted)" in text


def test_an_output_that_cannot_be_written_exits_2(cli, run, tmp_path):
    """One line."""
    (tmp_path / "file").write_text("")

    code, out, err = cli("report", run.path, "--out", tmp_path / "file")

    assert (2, "", 1) == (code, out, err.count("\n"))


def test_a_folder_that_is_no_run_exits_2(cli, tmp_path):
    """One line."""
    code, _, err = cli("report", tmp_path / "nowhere")

    assert (2, 1) == (code, err.count("\n"))


def test_of_a_run_in_which_no_cell_has_finished_the_page_says_so(cli, run, tmp_path):
    """And the exit code; beside another run it is a note."""
    empty = a_run(tmp_path / "empty", name="empty", run_id="empty")
    note = f"{empty.path}: no cell has finished, so that its page is empty\n"

    code, out, err = cli("report", empty.path, "--format", "md")
    beside = cli("report", run.path, empty.path, "--format", "md")

    assert (5, f"{empty.path}/table.md\n", note) == (code, out, err)
    assert (0, note) == (beside[0], beside[2])


@pytest.mark.parametrize("cell_id", ["\x1b[1m0", "a b", 'x" onclick="', "\u202e0"])
def test_a_cell_id_that_acts_on_a_terminal_has_its_row_and_its_detail(cli, tmp_path, cell_id):
    """A row's id and the links to it are the same, and hold nothing that an id may not."""
    metrics = {"activation_peak_bytes": 5, "peak_allocated_bytes": 9, "drift_bytes_per_step": 4}
    run = a_run(tmp_path / "run", a_record(cell_id=cell_id, metrics=metrics))

    code, _, err = cli("report", run.path)

    assert 0 == code, err
    page = (run.path / "report.html").read_text()
    (row,) = re.findall(r'<tr id="(cell-[^"]*)"', page)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", row)
    assert [row] == re.findall(r'<a href="#(cell-[^"]*)"', page)


@pytest.mark.parametrize("more", [(), ("--plot", "breakdown")], ids=["report", "plot"])
def test_a_full_disk_leaves_no_empty_folder(cli, run, tmp_path, monkeypatch, more):
    """One line; neither a folder of plots nor the one that was named."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("meftbench.report.figures.picture.replace_file", full)
    monkeypatch.setattr("meftbench.records.store.replace_file", full)
    before = sorted(run.path.iterdir())

    for folder in (run.path, tmp_path / "new"):
        code, out, err = cli("report", run.path, "--out", folder, *more)
        assert (2, "", 1) == (code, out, err.count("\n"))
        assert "cannot be written (No space left on device)" in err
    assert before == sorted(run.path.iterdir())
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_dir()]
