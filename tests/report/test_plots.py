"""What the plots show: the data of their artists."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from builders import STREAMS, a_measured_cell, a_record, a_run, a_sweep, measured
from meftbench.records.metrics import BREAKDOWN
from meftbench.records.record import Metric
from meftbench.report import plots
from meftbench.report.figures import pictures
from meftbench.report.tables import frame_of

MiB = 2**20


@pytest.fixture
def frame(tmp_path):
    return lambda *records: frame_of(a_run(tmp_path / "run", *records))


def an_axes():
    return Figure().add_subplot()


def lines(ax):
    """label -> (x, y) of each line that has a label of its own."""
    drawn = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn}


def test_activation_by_length_draws_mebibytes_against_tokens_with_the_slope(frame):
    """Linear in the length is slope 1, quadratic is slope 2; the source stands in the legend."""
    metric = "activation_peak_bytes"
    records = [a_record(sequence_length=s, metrics={metric: s * MiB}) for s in (512, 128)]
    records += [
        a_record(method="lora", device="cuda", sequence_length=s, metrics={metric: measured(s * s * MiB)})
        for s in (8, 16)
    ]
    ax = an_axes()

    plots.plot_activation_by_length(frame(*records), ax)

    # 16 × 16 MiB and 512 MiB are below 10 GiB: the axis is in MiB.
    assert {
        "full, slope 1.00 (counted)": ([128, 512], [128, 512]),
        "lora, slope 2.00 (measured)": ([8, 16], [64, 256]),
    } == lines(ax)
    assert ("activation memory (MiB)", "sequence length (tokens)") == (ax.get_ylabel(), ax.get_xlabel())
    assert ("log", "log") == (ax.get_xscale(), ax.get_yscale())


def test_a_large_axis_is_in_gibibytes(frame):
    """From 10 GiB on."""
    ax = an_axes()

    plots.plot_activation_by_batch(frame(a_record(metrics={"activation_peak_bytes": 16 * 2**30})), ax)

    assert {"full (counted)": ([8], [16])} == lines(ax)
    assert "activation memory (GiB)" == ax.get_ylabel()


def test_line_styles_tell_the_source(frame):
    """Measured, counted and predicted are never drawn alike."""
    cells = [a_record(method=m, metrics={"activation_peak_bytes": Metric(MiB, source)})
             for m, source in (("full", "measured"), ("lora", "counted"), ("meft1", "predicted"))]  # fmt: skip
    ax = an_axes()

    plots.plot_activation_by_length(frame(*cells), ax)

    assert ["-", "-.", "--"] == [line.get_linestyle() for line in ax.get_lines()]


def test_cells_out_of_memory_are_crosses_at_the_top_one_below_the_other(frame):
    """A missing point is marked as missing, not left to be guessed."""
    records = [a_record(metrics={"activation_peak_bytes": MiB})]
    records += [a_record("oom", method=m, sequence_length=512) for m in ("lora", "meft1")]
    ax = an_axes()

    plots.plot_activation_by_length(frame(*records), ax)

    found = lines(ax)
    assert [512] == found["lora: oom"][0] == found["meft1: oom"][0]
    assert 1 > found["lora: oom"][1][0] > found["meft1: oom"][1][0] > 0.8
    # In parts of the axes, above every value that is drawn.
    assert ax.get_ylim()[1] > 2


def test_breakdown_bars_end_at_the_peak(frame):
    """The parts are stacked from zero and sum to the peak; the total is written at the end."""
    record = a_measured_cell("full")
    ax = an_axes()

    plots.plot_breakdown(frame(record, a_record("oom", method="lora")), ax)

    widths = [bar.get_width() for container in ax.containers for bar in container]
    peak = record.metrics["peak_allocated_bytes"].value / MiB
    assert math.isclose(peak, sum(widths))
    assert math.isclose(peak, max(bar.get_x() + bar.get_width() for c in ax.containers for bar in c))
    assert [f"{peak:,.1f}", "oom"] == [text.get_text() for text in ax.texts]
    assert ["full", "lora"] == [text.get_text() for text in ax.get_yticklabels()]


def test_reconstruction_draws_both_streams_of_each_layer(frame):
    """First stream with a label, second hollow."""
    errors = [[1e-2, 2e-3], [1e-4, 2e-5]]
    ax = an_axes()

    plots.plot_reconstruction(
        frame(a_record(method="meft1", metrics={"reconstruction_rel": Metric(errors, "measured")})), ax
    )

    first, second = ax.get_lines()
    assert ([0, 1], [1e-2, 1e-4]) == (list(first.get_xdata()), list(first.get_ydata()))
    assert ([0, 1], [2e-3, 2e-5]) == (list(second.get_xdata()), list(second.get_ydata()))
    assert ("meft1 (measured)", "white") == (first.get_label(), second.get_markerfacecolor())


def test_exact_zero_has_a_floor_and_infinities_a_name(frame):
    """On a log axis neither has a place of its own; both are said in words."""
    errors = [[0.0, math.inf], [1e-3, math.nan], [1e-5, 1e-5]]
    ax = an_axes()

    plots.plot_reconstruction(
        frame(a_record(method="meft3", metrics={"reconstruction_rel": Metric(errors, "measured")})), ax
    )

    first, second = ax.get_lines()[:2]
    floor, ceiling = first.get_ydata()[0], second.get_ydata()[0]
    assert floor < 1e-5 < 1e-3 < ceiling
    assert second.get_ydata()[1] == ceiling
    assert ["inf", "nan"] == [text.get_text() for text in ax.texts]
    assert plots.EXACT == dict(zip(ax.get_yticks(), (t.get_text() for t in ax.get_yticklabels()), strict=True))[floor]


def test_a_method_that_is_exact_everywhere_is_drawn_on_the_floor(frame):
    """No finite error to take a scale from."""
    errors = Metric([[0.0, 0.0]] * 3, "measured")
    ax = an_axes()

    plots.plot_reconstruction(frame(a_record(method="meft1", metrics={"reconstruction_rel": errors})), ax)

    assert 1 == len({*ax.get_lines()[0].get_ydata()})
    assert plots.EXACT in [text.get_text() for text in ax.get_yticklabels()]


def test_dominated_methods_are_grey_and_named_so(frame):
    """Grey: another method is smaller and faster."""
    numbers = {"full": (300, 90), "lora": (200, 100), "meft1": (100, 80)}
    cells = [a_record(method=m, metrics={"peak_allocated_bytes": p * MiB, "tokens_per_s": measured(t)})
             for m, (p, t) in numbers.items()]  # fmt: skip
    ax = an_axes()

    plots.plot_memory_against_speed(frame(*cells), ax)

    drawn = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_color() for line in ax.get_lines()}
    assert {(300, 90): "#B8B8B8", (200, 100): plots.COLOUR["lora"], (100, 80): plots.COLOUR["meft1"]} == drawn
    assert {"full (dominated)", "lora", "meft1"} == {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_labels_of_points_at_one_place_stand_apart(frame, count):
    """Methods that cost the same keep readable names, all within the height of the axes."""
    cells = [a_record(method="meft1", method_params={"adapter_size": i + 1},
                      metrics={"peak_allocated_bytes": MiB, "tokens_per_s": measured(100)})
             for i in range(count)]  # fmt: skip
    ax = an_axes()

    plots.plot_memory_against_speed(frame(*cells), ax)

    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert count == len(heights)
    assert all(above - below > 0.05 for below, above in pairwise(heights))
    assert heights[0] >= 0
    assert heights[-1] <= 1


def test_slope_and_domination():
    """A power of three; a point equal to another is not dominated by it."""
    assert math.isclose(3, plots.slope([(x, 5 * x**3) for x in (2, 3, 7)]))
    assert plots.slope([(2, 5)]) is None
    assert [False, False, True, False] == plots.dominated([(1, 1), (1, 1), (2, 1), (2, 2)])


def test_methods_of_one_family_share_the_colour_and_not_the_marker(frame):
    """Up to a dozen methods can be told apart."""
    cells = [a_record(method=m) for m in ("lora", "lora+checkpoint", "lora+offload", "lora+checkpoint+offload")]
    cells += [a_record(method="lora", method_params={"rank": r}) for r in (2, 4)]

    found = plots.markers(frame(*cells))

    assert 6 == len({*found.values()})
    assert 1 == len({plots.colour(method) for method in found})


def test_every_category_of_the_breakdown_has_a_colour_of_its_own():
    """A category added to the metrics needs one here."""
    assert set(BREAKDOWN) == set(plots.CATEGORY)
    assert len(BREAKDOWN) == len({*plots.CATEGORY.values()})


def test_a_model_has_its_own_figures(frame):
    """Two models in one plot would be two scales in one plot."""
    records = a_sweep(["full", "meft1"], (1, 8), (16, 32))
    records += a_sweep(["full"], (1, 8), (16, 32), model="bert-tiny@random")

    names = [picture.name for picture in pictures(frame(*records))]

    assert "activation-by-length-bert-base-random" in names
    assert "activation-by-length-bert-tiny-random" in names
    assert "reconstruction-bert-base-random" in names
    assert "reconstruction-bert-tiny-random" not in names


def test_figures_have_a_panel_for_each_batch_size(frame):
    """The batch size is fixed within a panel, so a curve is over one thing alone."""
    found = {p.name: p for p in pictures(frame(*a_sweep(["full", "lora"], (1, 2, 4, 8), (16, 32))))}

    titles = [ax.get_title(loc="left") for ax in found["activation-by-length"].figure.axes]
    assert ["batch 1", "batch 2", "batch 4", "batch 8"] == titles
    assert ["16 tokens", "32 tokens"] == [ax.get_title(loc="left") for ax in found["activation-by-batch"].figure.axes]
    assert ["batch 8 × 32 tokens"] == [ax.get_title(loc="left") for ax in found["breakdown"].figure.axes]


def test_micro_batches_are_not_mixed(frame):
    """At an equal micro-batch or not at all."""
    records = a_sweep(["full"], (8,), (16, 32)) + [a_measured_cell("full", 8, s, micro_batch_size=2) for s in (16, 32)]

    found = {p.name: p for p in pictures(frame(*records))}

    assert ["batch 8, micro-batch 2", "batch 8"] == [
        ax.get_title(loc="left") for ax in found["activation-by-length"].figure.axes
    ]


def test_a_figure_is_the_same_bytes_every_time(frame):
    """No dates, no random ids: a committed report changes only where its numbers do."""
    table = frame(*a_sweep(["full", "meft1"], (1, 8), (16, 32)))

    first, second = ([picture.svg() for picture in pictures(table)] for _ in range(2))

    assert first == second
    assert "<dc:date>" not in "".join(first)


def test_a_run_in_which_every_cell_failed_has_no_figures(frame):
    """And asking for them is no error."""
    assert [] == pictures(frame(a_record("oom"), a_record("error", method="lora")))


def test_every_method_of_the_builders_has_a_colour():
    """A method without a colour of its own would look like any other."""
    assert all(plots.colour(method) != plots.colour("unheard-of") for method in STREAMS)
