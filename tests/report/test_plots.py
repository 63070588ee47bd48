"""What the plots show: the data of their artists."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from builders import (
    a_measured_cell,
    a_record,
    a_run,
    a_side_bits_sweep,
    a_sweep,
    an_exact_cell,
    measured,
    step_time,
)
from meftbench.catalogue.labels import Part
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.records.record import Metric
from meftbench.report.figures import plots, side_bits, style
from meftbench.report.figures.pictures import pictures
from meftbench.report.results import frame_of, wrong_gradient

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


def test_methods_that_are_exact_everywhere_say_so_in_the_legend(frame):
    """On the floor they hide each other; beside an error that is not zero, too."""
    zeros, errors = Metric([[0.0, 0.0]] * 2, "measured"), Metric([[1e-2, 0.0], [0.0, 0.0]], "measured")
    cells = [a_record(method="meft1", metrics={"reconstruction_rel": errors})]
    cells += [a_record(method=f"meft{n}-exact", metrics={"reconstruction_rel": zeros}) for n in (1, 2)]
    ax = an_axes()

    plots.plot_reconstruction(frame(*cells), ax)

    found = lines(ax)
    assert [
        "meft1 (measured)",
        f"meft1-exact (measured): {plots.EXACT}",
        f"meft2-exact (measured): {plots.EXACT}",
    ] == [*found]
    floor = ax.get_yticks()[0]
    assert [floor, floor] == found[f"meft1-exact (measured): {plots.EXACT}"][1]


def test_the_shift_is_drawn_over_side_bits_for_each_coupling_and_output(frame):
    """Other methods are horizontal, and the one that is exactly 0 has no place on a log axis: it is said."""
    ax = an_axes()

    side_bits.plot_shift_by_side_bits(frame(*a_side_bits_sweep((2, 1, 4))), ax)

    assert {
        "paper, mean": ([1, 2, 4], [1, 0.5, 0.125]),
        "paper, last": ([1, 2, 4], [1, 0.5, 0.125]),
        "centred, mean": ([1, 2, 4], [0.5, 0.25, 0.0625]),
        "centred, last": ([1, 2, 4], [0.5, 0.25, 0.0625]),
        "lora+checkpoint": ([0, 1], [0, 0]),
        "meft1": ([0, 1], [1.08, 1.08]),
    } == lines(ax)
    assert ["exactly 0, below the axis: lora+checkpoint"] == [text.get_text() for text in ax.texts]
    assert ("log", "starting-point shift (measured)") == (ax.get_yscale(), ax.get_ylabel())
    # The zero does not stretch the axis.
    assert 0.005 < ax.get_ylim()[0] < 0.0625
    assert ["1\n1/2", "2\n1/4", "4\n1/16"] == [text.get_text() for text in ax.get_xticklabels()]


def test_memory_over_side_bits_is_in_mebibytes_from_zero(frame):
    """What a bit costs is seen beside what is not saved; the source is said and is the line's style."""
    ax = an_axes()

    side_bits.plot_activation_by_side_bits(frame(*a_side_bits_sweep((1, 8), ("paper",))), ax)

    found = lines(ax)
    assert [1, 8] == found["paper, mean"][0]
    assert [28.1, 28.8] == [pytest.approx(y) for y in found["paper, mean"][1]]
    assert [pytest.approx(32.8 * 3)] * 2 == found["lora+checkpoint"][1]
    assert ("activation memory\n(MiB, counted)", 0) == (ax.get_ylabel(), ax.get_ylim()[0])
    assert plots.LINE["counted"] == ax.get_lines()[0].get_linestyle()


def test_time_over_side_bits_has_its_quartiles(frame):
    """In milliseconds; a difference that is smaller than the bars is none."""
    cells = [an_exact_cell(m, metrics={"step_time_s": step_time(0.1 * m, spread=0.5)}) for m in (1, 2)]
    ax = an_axes()

    side_bits.plot_time_by_side_bits(frame(*cells), ax)

    assert {"paper, mean": ([1, 2], [100, 200])} == lines(ax)
    bars = [(*low, *high) for low, high in ax.collections[0].get_segments()]
    assert [(1, 50, 1, 150), (2, 100, 2, 300)] == [tuple(map(pytest.approx, bar)) for bar in bars]
    assert "step time (ms, measured)" == ax.get_ylabel()


def test_lines_of_equal_memory_can_be_told_apart(frame):
    """Each line has its own colour and marker, and a smaller one than the line below it."""
    ax = an_axes()

    side_bits.plot_activation_by_side_bits(frame(*a_side_bits_sweep((1, 2))), ax)

    drawn = ax.get_lines()[:4]
    assert 4 == len({line.get_color() for line in drawn}) == len({line.get_marker() for line in drawn})
    assert all(below.get_markersize() > above.get_markersize() for below, above in pairwise(drawn))


def test_a_sweep_with_another_setting_has_another_marker_and_names_it(frame):
    """The colour says the coupling and output, so it is the same."""
    cells = [an_exact_cell(m, method_params=extra) for extra in ({}, {"adapter_size": 8}) for m in (1, 2)]
    ax = an_axes()

    side_bits.plot_shift_by_side_bits(frame(*cells), ax)

    plain, small = ax.get_lines()
    assert ("paper, mean", "paper, mean, adapter_size=8") == (plain.get_label(), small.get_label())
    assert plain.get_color() == small.get_color()
    assert plain.get_marker() != small.get_marker()


def test_side_bits_without_a_number_are_named(frame):
    """A gap in a line does not say why."""
    failed = a_record("oom", method="meft1-exact", method_params={"side_bits": 7})
    ax = an_axes()

    side_bits.plot_shift_by_side_bits(frame(an_exact_cell(1), an_exact_cell(2), failed), ax)

    assert {"paper, mean\nm=7: oom": ([1, 2], [1, 0.5])} == lines(ax)


@pytest.mark.parametrize(
    ("why", "cells", "appears"),
    [
        ("two side bits", lambda: [an_exact_cell(1), an_exact_cell(2)], True),
        ("unsaid side bits are 3", lambda: [an_exact_cell(1), an_exact_cell(None)], True),
        ("exact by a setting", lambda: [an_exact_cell(m, method="meft1", method_params={"arithmetic": "exact"})
                                        for m in (1, 2)], True),
        ("one", lambda: [an_exact_cell(1)], False),
        ("3 said and unsaid is one", lambda: [an_exact_cell(3), an_exact_cell(None)], False),
        ("no two of one coupling", lambda: [an_exact_cell(1), an_exact_cell(2, "centred")], False),
        ("no two of one method", lambda: [an_exact_cell(1), an_exact_cell(2, method="meft2-exact")], False),
        ("no two at one length", lambda: [an_exact_cell(1), an_exact_cell(2, sequence_length=16)], False),
        ("no two at one micro-batch", lambda: [an_exact_cell(1), an_exact_cell(2, micro_batch_size=2)], False),
        ("no two at one precision", lambda: [an_exact_cell(1), an_exact_cell(2, precision="bf16")], False),
        ("the other failed", lambda: [an_exact_cell(1),
                                      a_record("oom", method="meft1-exact", method_params={"side_bits": 2})], False),
        ("floating point", lambda: a_sweep(["meft1", "meft3"]), False),
    ],
)  # fmt: skip
def test_the_side_bits_figure_appears_where_one_method_has_two(frame, why, cells, appears):
    """Two of the same method and settings, at one shape: less is no line."""
    assert appears == ("side-bits" in [picture.name for picture in pictures(frame(*cells()))]), why


def test_the_side_bits_figure_shares_one_axis_and_one_legend(frame):
    """Three axes above each other; the alt text counts the settings rather than reading out dozens."""
    records = [*a_side_bits_sweep((1, 2, 3, 4)), a_measured_cell("full"), a_measured_cell("houlsby")]

    found = {picture.name: picture for picture in pictures(frame(*records))}["side-bits"]

    shift, memory, time = found.figure.axes
    assert shift.get_shared_x_axes().joined(shift, time)
    assert ["", "", "side bits m, factor 2⁻ᵐ"] == [ax.get_xlabel() for ax in (shift, memory, time)]
    assert "meft1-exact, batch 8 × 128 tokens" == shift.get_title(loc="left")
    # What is compared is what exact reversal would replace; the others are in the table.
    labels = ["paper, mean", "paper, last", "centred, mean", "centred, last", "lora+checkpoint", "meft1"]
    assert labels == [text.get_text() for text in shift.get_legend().get_texts()]
    assert (memory.get_legend(), time.get_legend()) == (None, None)
    assert "for lora+checkpoint, meft1, meft1-exact (16 settings); panels" in found.alt


def test_a_metric_that_no_cell_has_takes_no_room_over_side_bits(frame):
    """A run of the memory pass alone has one panel."""
    metrics = {"activation_peak_bytes": MiB, "peak_allocated_bytes": MiB}
    cells = [a_record(method="meft1-exact", method_params={"side_bits": m}, metrics=metrics) for m in (1, 2)]

    found = {picture.name: picture for picture in pictures(frame(*cells))}["side-bits"]

    assert ["activation memory\n(MiB, counted)"] == [ax.get_ylabel() for ax in found.figure.axes]


def test_elsewhere_a_sweep_over_side_bits_is_one_method(frame):
    """Dozens of methods that differ in a bit would bury the others; the picture says that they are left out."""
    records = [*a_side_bits_sweep((1, 2, 4), ("paper",)), an_exact_cell(8, method="meft2-exact")]

    found = {picture.name: picture for picture in pictures(frame(*records))}["memory-and-speed"]

    names = {text.get_text().partition(" (dominated)")[0] for text in found.figure.axes[0].texts}
    # 2 is as near to the default as 4, and first.
    assert {
        "lora+checkpoint",
        "meft1",
        "meft1-exact(side_bits=2)",
        "meft1-exact(output=last,side_bits=2)",
        "meft2-exact(side_bits=8)",
    } == names
    note = "Methods that were run at several side bits are shown at 2 alone."
    assert note == found.figure.get_supxlabel()
    assert note in found.alt


def test_long_settings_stand_below_the_name(frame):
    """A label as wide as the axes would leave no room for them."""
    swept = {"coupling": "centred", "output": "last", "side_bits": 4}

    assert "meft1-exact(side_bits=4) (counted)" == plots.named([Part("meft1-exact", {"side_bits": 4})], " (counted)")
    assert [
        "meft1-exact+offload (counted)",
        "  coupling=centred, output=last,",
        "  side_bits=4",
    ] == plots.named([Part("meft1-exact", swept), Part("offload", {})], " (counted)").splitlines()
    # Without settings there is nothing to put below.
    assert "lora+checkpoint+offload, slope 1.00 (counted)" == plots.named(
        [Part(name, {}) for name in ("lora", "checkpoint", "offload")], ", slope 1.00 (counted)"
    )


def test_dominated_methods_are_grey_and_named_so(frame):
    """Grey: another method is smaller and faster."""
    numbers = {"full": (300, 90), "lora": (200, 100), "meft1": (100, 80)}
    cells = [a_record(method=m, metrics={"peak_allocated_bytes": p * MiB, "tokens_per_s": measured(t)})
             for m, (p, t) in numbers.items()]  # fmt: skip
    ax = an_axes()

    plots.plot_memory_against_speed(frame(*cells), ax)

    drawn = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_color() for line in ax.get_lines()}
    assert {(300, 90): "#B8B8B8", (200, 100): style.COLOUR["lora"], (100, 80): style.COLOUR["meft1"]} == drawn
    assert {"full (dominated)", "lora", "meft1"} == {text.get_text() for text in ax.texts}


def test_a_method_that_does_not_compute_the_gradient_is_on_no_frontier(frame):
    """Small and fast with a gradient that is wrong, or none, it beats nobody; the note says by how much it is wrong."""
    numbers = {
        "lora": (200, 100, None),
        "meft1": (150, 110, 0.03),
        "meft2": (90, 120, 3.08),
        "meft3": (80, 120, math.nan),
    }
    cells = [
        a_record(method=m, metrics={"peak_allocated_bytes": p * MiB, "tokens_per_s": measured(t)}
                 | ({"gradient_rel_max": measured(error)} if error is not None else {}))
        for m, (p, t, error) in numbers.items()
    ]  # fmt: skip
    ax = an_axes()

    plots.plot_memory_against_speed(frame(*cells), ax)

    drawn = {line.get_xdata()[0]: (line.get_color(), line.get_markerfacecolor()) for line in ax.get_lines()}
    grey, own = "#B8B8B8", style.COLOUR["meft1"]
    assert {200: (grey, grey), 150: (own, own), 90: (grey, "none"), 80: (grey, "none")} == drawn
    assert {
        "lora (dominated)",
        "meft1",
        "meft2 (gradient is wrong by 308 %)",
        "meft3 (gradient is not finite)",
    } == {text.get_text() for text in ax.texts}


@pytest.mark.parametrize(
    ("gradient", "reconstruction", "wrong"),
    [
        (None, None, None),
        (0.1, 300.0, None),
        (0.11, 0.0, "gradient is wrong by 11 %"),
        (99.4, 0.0, "gradient is wrong by 9940 %"),
        (150.0, 0.0, "gradient is wrong by 150 times its size"),
        (8.05e23, 0.0, "gradient is wrong by 8e23 times its size"),
        (math.inf, None, "gradient is not finite"),
        (None, 0.01, None),
        (None, 0.02, "what backward recomputes is wrong"),
        (None, math.nan, "what backward recomputes is wrong"),
    ],
)
def test_what_computes_the_gradient_is_decided_by_its_error(gradient, reconstruction, wrong):
    """Ten percent, which bfloat16's rounding does not reach; without it, one percent of what is recomputed."""
    assert wrong == wrong_gradient({"gradient_rel_max": gradient, "reconstruction_rel_max": reconstruction})


def test_the_figure_says_what_hollow_means_where_something_is(frame):
    """And says nothing of it elsewhere."""
    right, wrong = (a_measured_cell("meft3", metrics={"gradient_rel_max": measured(error)}) for error in (0.02, 3.1))

    notes = [
        {picture.name: picture for picture in pictures(frame(cell))}["memory-and-speed"].alt for cell in (right, wrong)
    ]

    assert ["Hollow: the gradient is wrong by more than 10%" in note for note in notes] == [False, True]


def test_thirty_layers_that_are_lost_and_thirty_that_are_exact_are_one_picture(frame):
    """A floating-point method whose error grows to inf and NaN toward the input, beside exact reversal: nothing is
    dropped, each layer that is not finite has a triangle at the top, and one note says which they are."""
    lost = [[math.nan, math.nan]] * 4 + [[math.inf, math.nan]] * 8
    kept = [[10.0 ** (29 - layer), 10.0 ** (28 - layer)] for layer in range(12, 30)]
    cells = [
        a_record(method="meft3", metrics={"reconstruction_rel": Metric([*lost, *kept], "measured")}),
        a_record(method="meft3-exact", metrics={"reconstruction_rel": Metric([[0.0, 0.0]] * 30, "measured")}),
    ]
    ax = an_axes()

    plots.plot_reconstruction(frame(*cells), ax)

    float_first, float_second, exact_first, _ = ax.get_lines()[:4]
    assert [30] * 3 == [len(line.get_ydata()) for line in (float_first, float_second, exact_first)]
    assert "meft3 (measured), not finite in 12 layers" == float_first.get_label()
    ceiling = float_first.get_ydata()[0]
    assert [ceiling] * 12 == list(float_first.get_ydata()[:12]) == list(float_second.get_ydata()[:12])
    assert ceiling > max(float_first.get_ydata()[12:])
    assert {ax.get_yticks()[0]} == {*exact_first.get_ydata()}
    triangles = [line for line in ax.get_lines() if line.get_marker() == "^"]
    assert [*range(12)] == [line.get_xdata()[0] for line in triangles]
    assert ["nan: layers 0 to 3; inf, nan: layers 4 to 11"] == [text.get_text() for text in ax.texts]
    assert ax.get_ylim()[0] < ax.get_yticks()[0] < ceiling < ax.get_ylim()[1]


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

    of_methods = frame(*cells)
    found = plots.markers(of_methods)

    assert 6 == len({*found.values()})
    assert 1 == len({plots.colour(name) for name in of_methods["method_name"]})


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


def test_methods_at_two_micro_batches_are_never_in_one_panel(frame):
    """A smaller micro-batch shrinks every method: beside a larger one it would win by that alone."""
    records = a_sweep(["full", "houlsby"], (4, 8), (16, 32))
    records += a_sweep(["full", "parallel"], (4, 8), (16, 32), micro_batch_size=2)
    records += [an_exact_cell(m) for m in (1, 2)] + [an_exact_cell(m, micro_batch_size=2) for m in (4, 8)]

    drawn = pictures(frame(*records))

    seen = [" ".join(text.get_text() for text in ax.findobj(Text)) for picture in drawn for ax in picture.figure.axes]
    assert any("houlsby" in words for words in seen)
    assert any("parallel" in words for words in seen)
    assert not any("houlsby" in words and "parallel" in words for words in seen)
    swept = [
        drawn[0].figure.axes[0].get_title(loc="left"),
        *map(Text.get_text, drawn[0].figure.axes[-1].get_xticklabels()),
    ]
    assert ["meft1-exact, batch 8 × 128 tokens", "1\n1/2", "2\n1/4"] == swept


def test_a_figure_is_the_same_bytes_every_time(frame):
    """No dates, no random ids: a committed report changes only where its numbers do."""
    table = frame(*a_sweep(["full", "meft1"], (1, 8), (16, 32)))

    first, second = ([picture.svg() for picture in pictures(table)] for _ in range(2))

    assert first == second
    assert "<dc:date>" not in "".join(first)


def test_a_run_in_which_every_cell_failed_has_no_figures(frame):
    """And asking for them is no error."""
    assert [] == pictures(frame(a_record("oom"), a_record("error", method="lora")))


def test_every_method_has_a_colour_of_its_own():
    """A method added to the catalogue needs one, or it would look like any other."""
    colours = [plots.colour(method) for method in (*METHODS, "unheard-of")]

    assert len(colours) == len({*colours})
