"""What the plots of trainings hold: the artists' data."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from builders import a_measured_cell, a_run
from meftbench.records.record import Metric
from meftbench.report.figures.pictures import pictures
from meftbench.report.figures.score_plots import plot_learning_curves, plot_score_by_memory, plot_score_by_time
from meftbench.report.results import frame_of
from scored_runs import METHODS, a_score, scored_run


@pytest.fixture
def drawn(tmp_path):
    """The axes on which a plot has drawn a run of some records."""

    def axes(plot, *records):
        ax = Figure().add_subplot()
        plot(frame_of(a_run(tmp_path / "run", *records)), ax)
        return ax

    return axes


def points(ax):
    """Label to place, length of the bar up and down, and opacity."""
    found = {}
    for container in ax.containers:
        line, _, (bars,) = container.lines
        (low, high) = bars.get_segments()[0][:, 1]
        found[container.get_label()] = (line.get_xdata()[0], line.get_ydata()[0], high - low, line.get_alpha())
    return found


def test_score_beside_memory(drawn):
    """A point a method at its best rate; the bar is the deviation over seeds on both sides."""
    scores = (0.70, 0.72, 0.74)

    ax = drawn(plot_score_by_memory, *(a_score(score=score, seed=seed) for seed, score in enumerate(scores)))

    assert (96.0, pytest.approx(0.72), pytest.approx(0.04), 1.0) == points(ax)["full"]
    assert ("log", "activation memory of a step (MiB)", "accuracy on validation") == (
        ax.get_xscale(),
        ax.get_xlabel(),
        ax.get_ylabel(),
    )


def test_what_is_beaten_in_both_is_paler(drawn):
    """The line joins the others, from the cheapest up; what a cheaper one equals within the deviation is not on it."""
    ax = drawn(plot_score_by_memory, *scored_run(("rte",)))

    found = points(ax)
    assert list(METHODS) == list(found)
    strong = {method for method, (_, _, _, alpha) in found.items() if alpha == 1}
    assert {"full", "meft3"} <= strong
    assert {"lora", "meft1", "houlsby"}.isdisjoint(strong)
    front = next(line for line in ax.lines if len(line.get_xdata()) > 1)
    assert sorted(x for method, (x, *_) in found.items() if method in strong) == list(front.get_xdata())
    assert list(np.sort(front.get_ydata())) == list(front.get_ydata())


def test_score_beside_time(drawn):
    """Of all training steps, the mean over seeds."""
    ax = drawn(plot_score_by_time, a_score(), a_score(seed=1))

    assert 61.5 == points(ax)["full"][0]


@pytest.mark.parametrize("spread", [1, 4, 40, 4000])
def test_ticks_are_numbers_that_people_write(drawn, spread):
    """Three at least, on a log axis over less than an octave as over decades; none as 10²."""
    ax = drawn(
        plot_score_by_memory,
        *(a_score("lora", score=0.5 + i / 10, metrics={"activation_peak_bytes": int(2**20 * 13 * (1 + spread * i))},
                  training={"epochs": 1.0 + i}) for i in range(2)),
    )  # fmt: skip
    ax.figure.draw_without_rendering()
    low, high = ax.get_xlim()
    shown = [
        label.get_text()
        for label, place in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)
        if low <= place <= high
    ]

    assert 3 <= len(shown) <= 8
    assert all(text.replace(",", "").replace(".", "").isdecimal() for text in shown), shown


def test_a_training_of_its_own_looks_its_own(drawn):
    """Without reversal: the same colour, but hollow and dashed."""
    records = [a_score("meft1-exact"), a_score("meft1-exact", training={"ordinary": True})]

    faces = [c.lines[0].get_markerfacecolor() for c in drawn(plot_score_by_memory, *records).containers]
    dashes = {line.get_label(): line.get_linestyle() for line in drawn(plot_learning_curves, *records).lines}

    assert faces[0] != "white" == faces[1]
    assert {"meft1-exact": "-", "meft1-exact (ordinary)": "--"} == dashes


def a_curve(*scores):
    return {"learning_curve": Metric([[10 * i, 0.5, score] for i, score in enumerate(scores, 1)], "measured")}


def test_learning_curves(drawn):
    """The mean over seeds, between the lowest and the highest; where a seed ended early, of those that are left."""
    ax = drawn(
        plot_learning_curves,
        a_score(metrics=a_curve(0.5, 0.6, 0.7)),
        a_score(seed=1, metrics=a_curve(0.7, 0.8)),
    )

    (line,) = ax.lines
    assert [[10, 0.6], [20, 0.7], [30, 0.7]] == np.column_stack(line.get_data()).round(6).tolist()
    (band,) = ax.collections
    assert {0.5, 0.6, 0.7, 0.8} == {round(float(y), 3) for y in band.get_paths()[0].vertices[:, 1]}


def test_an_evaluation_without_a_score_is_a_gap(drawn):
    ax = drawn(plot_learning_curves, a_score(metrics=a_curve(None, 0.6, 0.7)))

    assert [20, 30] == list(ax.lines[0].get_xdata())


def test_which_pictures_a_run_has(tmp_path):
    """A panel a task and setting; those of steps are of the cells without a task alone."""
    records = [*scored_run(seeds=(0,)), a_score(precision="bf16"), a_measured_cell(model="minilm")]

    found = {picture.name: picture for picture in pictures(frame_of(a_run(tmp_path / "run", *records)))}

    titles = [ax.get_title(loc="left") for ax in found["score-by-memory"].figure.axes]
    assert [
        "rte, batch 16 × 48 tokens, fp32",
        "mrpc, batch 16 × 48 tokens, fp32",
        "rte, batch 16 × 48 tokens, bf16",
    ] == titles
    assert {"score-by-memory", "score-by-time", "learning-curves", "breakdown"} <= set(found)
    assert "within the deviation over seeds" in found["score-by-time"].alt
