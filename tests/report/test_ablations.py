"""What the plots of ablations hold: the artists' data."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from builders import a_run
from meftbench.records.record import Metric
from meftbench.report.figures.pictures import pictures
from meftbench.report.results import frame_of
from meftbench.report.views.ablations import draws_for, plot_score_by_shift, shifted, sweeps
from scored_runs import a_score


def a_shifted_score(score, shift, seed=0, **params):
    metrics = {"starting_point_shift": Metric(shift, "measured")}
    return a_score("meft1-exact", score, seed=seed, metrics=metrics, method_params=params, observed={"layers": 6})


@pytest.fixture
def frame(tmp_path):
    """Two seeds of the default, one of every other setting, and one with two settings at once."""
    records = [
        a_shifted_score(0.80, 0.70),
        a_shifted_score(0.70, 0.70, seed=1),
        a_shifted_score(0.71, 1.70, side_bits=1),
        a_shifted_score(0.72, 0.35, output="mean"),
        a_shifted_score(0.73, 0.14, output="mean", coupling="paper"),
        a_shifted_score(0.60, 0.70, adapter_size=8),
        a_shifted_score(0.65, 0.61, reversible_layers=2),
        a_shifted_score(0.50, 0.61, reversible_layers=2, adapter_size=8),
    ]
    return frame_of(a_run(tmp_path / "run", *records))


def lines(ax):
    return {c.get_label(): [c.lines[0].get_xdata().tolist(), c.lines[0].get_ydata().tolist()] for c in ax.containers}


@pytest.mark.parametrize(
    ("axis", "places", "scores"),
    [
        ("side_bits", [1, 4], [0.71, 0.75]),
        ("adapter_size", [8, 64], [0.60, 0.75]),
        ("reversible_layers", [2, 6], [0.65, 0.75]),
    ],
)
def test_score_by_a_setting(frame, axis, places, scores):
    """What is alike but for it is a line, its unsaid default in its place; the mean over seeds."""
    ax = Figure().add_subplot()
    draws_for(axis)[0](frame, ax)

    assert [places, pytest.approx(scores)] in lines(ax).values()
    assert all(len({r.first["settings"] for r in line}) == len(line) for line in sweeps(frame, axis))


def test_reversible_layers_show_what_they_save(frame):
    """Memory below the score, from zero."""
    score, memory = draws_for("reversible_layers")
    ax = Figure().add_subplot()
    memory(frame, ax)

    assert score is not memory
    assert 0 == ax.get_ylim()[0]
    assert all(value > 0 for _, values in lines(ax).values() for value in values)


def test_score_by_shift(frame):
    """Points are where coupling, output and factor alone put them; adapters of another size are not among them."""
    ax = Figure().add_subplot()
    plot_score_by_shift(frame, ax)
    points = {(c.lines[0].get_xdata()[0], round(c.lines[0].get_ydata()[0], 3)) for c in ax.containers}

    assert {(0.70, 0.75), (1.70, 0.71), (0.35, 0.72), (0.14, 0.73)} == points
    assert {"1/16", "1/2"} == {text.get_text() for text in ax.texts}
    assert 4 == len(shifted(frame))


def test_a_run_without_a_sweep_has_no_such_figure(tmp_path):
    """One setting of each method is no ablation."""
    frame = frame_of(a_run(tmp_path / "run", a_shifted_score(0.8, 0.7), a_score("lora", 0.7)))

    assert {"score-by-memory", "score-by-time", "learning-curves"} == {picture.name for picture in pictures(frame)}
