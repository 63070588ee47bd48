"""Predicted against measured, drawn."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from builders import a_measured_cell, a_record, a_run
from meftbench.report.render.report import write_report
from meftbench.report.views.validation import plot_errors_by_method, plot_predicted_against_measured, validation_picture
from meftbench.verdicts.validation import METRICS, Error, Validation, save

GiB = 2**30


def an_error(measured, predicted, method="lora", precision="bf16", metric=METRICS[0]):
    return Error(f"m/{method}/b1/s1", method, precision, "flash", metric, measured, predicted, method)


def test_a_point_is_a_cell_and_the_line_is_where_both_agree():
    """Gibibytes on both axes, with the same limits; a colour a method, a marker a precision."""
    errors = [
        an_error(20 * GiB, 30 * GiB),
        an_error(40 * GiB, 40 * GiB, "full"),
        an_error(80 * GiB, 80 * GiB, "full", "fp32"),
    ]
    ax = Figure().add_subplot()

    plot_predicted_against_measured(errors, ax)

    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert {"lora, bf16", "full, bf16", "full, fp32", "predicted = measured"} == set(drawn)
    assert ([20], [30]) == (list(drawn["lora, bf16"].get_xdata()), list(drawn["lora, bf16"].get_ydata()))
    identity = drawn["predicted = measured"]
    assert list(identity.get_xdata()) == list(identity.get_ydata()) == list(ax.get_xlim()) == list(ax.get_ylim())
    assert drawn["full, bf16"].get_color() == drawn["full, fp32"].get_color() != drawn["lora, bf16"].get_color()
    assert drawn["full, bf16"].get_marker() != drawn["full, fp32"].get_marker()
    assert "measured (GiB)" == ax.get_xlabel()


def test_errors_have_a_line_a_method_and_their_median():
    """In percent: 1, 2 and 10 too much have the median 2; zero is in the middle."""
    errors = [an_error(100, predicted) for predicted in (101, 102, 110)] + [an_error(100, 95, "full")]
    ax = Figure().add_subplot()

    plot_errors_by_method(errors, ax, ["full", "lora", "meft1"])

    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert ([1, 2, 10], [1, 1, 1]) == (pytest.approx(drawn["lora"].get_xdata()), list(drawn["lora"].get_ydata()))
    assert [pytest.approx([-5]), pytest.approx([2])] == [
        list(line.get_xdata()) for line in ax.get_lines() if line.get_label() == "_median"
    ]
    assert ["full", "lora", "meft1"] == [label.get_text() for label in ax.get_yticklabels()]
    low, high = ax.get_xlim()
    assert (-low, True) == (high, high > 10)


def test_a_column_is_a_metric_and_the_worst_cell_is_told():
    errors = [an_error(100, 90, metric=metric) for metric in METRICS[:2]]

    picture = validation_picture(Validation("t4", errors, []))

    assert ["peak allocated", "", "activation peak", ""] == [ax.get_title(loc="left") for ax in picture.figure.axes]
    assert "the largest error is -10.0%, of m/lora/b1/s1" in picture.alt


def test_the_page_shows_a_validation_where_the_run_has_one(tmp_path):
    """Scatter and spreads; without, nothing of it."""
    run = a_run(tmp_path / "run", a_measured_cell())
    write_report([run], run.path, {"html"})
    assert "Predictions against" not in (run.path / "report.html").read_text()

    save(run, Validation("t4", [an_error(2 * GiB, 3 * GiB)], ["m/full/b1/s1: error: <no>"]))
    written = write_report([run], run.path, {"html"})

    text = (run.path / "report.html").read_text()
    assert "Predictions against measurements" in text
    assert "not predicted: m/full/b1/s1: error: &lt;no&gt;" in text
    assert "predicted-against-measured.png" in {file.name for file in written}


def test_page_and_table_say_what_predictions_were_held_against(tmp_path):
    """Of predicted cells alone."""
    predicted = a_run(tmp_path / "predicted", a_record(device="predicted:t4"))
    counted = a_run(tmp_path / "counted", a_record())
    for run in (predicted, counted):
        write_report([run], run.path, {"html", "md"})

    said = "not validated on Tesla T4; rules held against published measurements"
    for file in ("report.html", "table.md"):
        assert said in (predicted.path / file).read_text()
        assert said not in (counted.path / file).read_text()
