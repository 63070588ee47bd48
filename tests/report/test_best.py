"""Each method stands with the levers with which it peaks lowest, and what was not tried is said."""

from __future__ import annotations

import pytest

from builders import a_record, a_run, counted, measured
from meftbench.report.render.html import page
from meftbench.report.render.markdown import markdown
from meftbench.report.results import frame_of
from meftbench.report.views.best import all_best_levers

MiB = 2**20


def a_peak(method, mebibytes, source=counted, **fields):
    """A cell of a method with levers, in that many MiB."""
    return a_record(method=method, metrics={"peak_allocated_bytes": source(mebibytes * MiB)}, **fields)


@pytest.fixture
def run(tmp_path):
    records = [
        a_peak("full", 400),
        a_peak("lora", 200),
        a_peak("lora+checkpoint", 100),
        a_peak("lora+checkpoint+tiled_mlp", 90),
        a_peak("meft1-exact", 95),
        a_peak("full+checkpoint", 1, batch_size=4),
    ]
    return a_run(tmp_path, *records)


def test_the_lowest_peak_of_each_method_is_named(run):
    (found,) = all_best_levers(frame_of(run))
    (comparison,) = found.comparisons  # no method ran in two forms at the other shape

    assert [(row.label, row.peak / MiB, row.tried) for row in comparison.rows] == [
        ("lora+checkpoint+tiled_mlp", 90, 3),
        ("meft1-exact", 95, 1),
        ("full", 400, 1),
    ]
    assert "lora+checkpoint+tiled_mlp 90.0 MiB (counted); meft1-exact +5.6%; full +344.4%" in comparison.sentence()


def test_levers_that_were_not_open_to_all_are_said(run):
    """Checkpointing takes the place of reversal, and so is not missed with a reversible method."""
    (found,) = all_best_levers(frame_of(run))

    assert found.unequal == (
        "+checkpoint was not tried with full",
        "+tiled_mlp was not tried with full",
    )


def test_a_measured_peak_is_not_ranked_beside_a_counted_one(tmp_path):
    run = a_run(tmp_path, a_peak("lora", 200), a_peak("lora+checkpoint", 100), a_peak("full", 50, measured))

    assert all_best_levers(frame_of(run)) == []


def test_cells_that_failed_are_left_out(tmp_path):
    records = [a_peak("lora", 200), a_peak("lora+checkpoint", 100), a_peak("full", 50, status="oom")]

    assert all_best_levers(frame_of(a_run(tmp_path, *records))) == []


def test_page_and_markdown_have_them(run):
    frame = frame_of(run)

    assert "Each method with its best levers" in page([run], frame, lambda: [])
    assert r"+tiled\_mlp was not tried with full." in markdown([run], frame)
