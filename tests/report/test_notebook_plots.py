"""Plots by name, with the numbers behind them, and what notebooks show."""

from __future__ import annotations

import csv

import pytest

import meftbench
from builders import a_measured_cell, a_run, a_sweep
from meftbench.cli import main

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path):
    return a_run(tmp_path / "run", *a_sweep(["full", "meft1"], (1, 8), (16, 32)))


def test_a_plot_has_a_figure_and_the_numbers_that_it_shows(run):
    """In bytes, with their source, a row for each cell of each panel."""
    plots = meftbench.plots(run)

    assert {"activation-by-length", "breakdown", "memory-and-speed"} <= plots.keys()
    by_length = plots["activation-by-length"]
    assert ["batch 1", "batch 8"] == [ax.get_title(loc="left") for ax in by_length.figure.axes]
    assert 8 == len(by_length.data)
    recorded = {record.cell_id: record.value("activation_peak_bytes") for record in run.records}
    assert recorded == dict(zip(by_length.data["cell_id"], by_length.data["activation_peak_bytes"], strict=True))
    assert {"counted"} == set(by_length.data["activation_peak_bytes_source"])
    assert by_length._repr_png_().startswith(b"\x89PNG")


def test_plots_print_as_their_names_and_titles(run):
    """Not as the tables behind them."""
    plots = meftbench.plots(run)

    assert repr(plots["breakdown"]) == f"Picture(name='breakdown', title={plots['breakdown'].title!r})"
    assert len(str(plots)) < 200 * len(plots)


def test_a_picture_is_the_same_bytes_for_the_same_records(run):
    """Whoever draws it."""
    first, second = (meftbench.plots([run])["breakdown"] for _ in range(2))

    assert (first.png, first.svg()) == (second.png, second.svg())


def test_report_writes_one_plot_by_name(run, capsys):
    """With its numbers; the rest of a report is left alone."""
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run.path), "--plot", "memory-and-speed"])

    assert 0 == ended.value.code
    files = {file.name for file in (run.path / "plots").iterdir()}
    assert files == {f"memory-and-speed.{kind}" for kind in ("png", "svg", "csv")}
    assert not (run.path / "report.html").exists()
    with (run.path / "plots" / "memory-and-speed.csv").open(newline="") as stream:
        head, *rows = csv.reader(stream)
    assert "peak_allocated_bytes [byte]" in head
    assert 2 == len(rows)


def test_a_plot_that_is_not_there_is_one_line(run, capsys):
    """It names those that are."""
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run.path), "--plot", "pie"])

    assert 5 == ended.value.code
    assert "no plot 'pie'; it has activation-by-length, activation-by-batch, breakdown" in capsys.readouterr().err
    assert not (run.path / "plots").exists()


def test_a_notebook_shows_runs_and_records_as_text(tmp_path):
    """The answer and the table; nothing of a record becomes an element."""
    hostile = a_measured_cell("full", observed={"label": f"{HOSTILE}/full/b8/s128", "model": HOSTILE})
    run = a_run(tmp_path / "run", hostile, a_measured_cell("lora"), name=HOSTILE)

    shown = [run._repr_html_(), run.records[0]._repr_html_()]

    for html in shown:
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "<table>" in html
    assert "at batch 8 × 128 tokens" in shown[0]
    assert "peak_allocated_bytes" in shown[1]
