"""Two runs held against each other: texts, noise, refusals and exit codes."""

from __future__ import annotations

import math

import pytest

from builders import MiB, a_record, a_run, measured, step_time
from meftbench.errors import UserError
from meftbench.records.record import Metric
from meftbench.report.render.comparisons import comparison_text
from meftbench.verdicts.compare import compare, exit_code

ACTIVATION = "activation_peak_bytes"


@pytest.fixture
def runs(tmp_path):
    """Two runs from two lists of records; `second` describes the second's folder."""

    def built(first, second, **suite_or_environment):
        return a_run(tmp_path / "a", *first), a_run(tmp_path / "b", *second, **suite_or_environment)

    return built


def test_a_change_is_one_line(runs):
    """Judgement, cell, metric, both values, source, difference in the unit and in percent."""
    pair = runs([a_record(metrics={ACTIVATION: 412 * MiB})], [a_record(metrics={ACTIVATION: 430 * MiB})])

    comparison = compare(*pair)

    assert [
        "worse: bert-base@random/full/b8/s128: activation_peak_bytes 412.0 MiB -> 430.0 MiB counted (+18.0 MiB, +4.37%)"
    ] == [change.text() for change in comparison.changes]
    assert "1 cell in both runs: 1 worse" == comparison.summary()


def test_one_byte_is_a_change_where_bytes_are_counted(runs):
    """Counted values repeat exactly; the text does not round the change away."""
    pair = runs([a_record(metrics={ACTIVATION: 412 * MiB})], [a_record(metrics={ACTIVATION: 412 * MiB - 1})])

    assert "better" == compare(*pair).changes[0].judgement
    assert "432,013,312 B -> 432,013,311 B counted (-1 B, -0.00%)" == compare(*pair).changes[0].numbers()


@pytest.mark.parametrize(("seconds", "judgement"), [(1.0, "same"), (1.015, "noise"), (1.05, "worse"), (0.9, "better")])
def test_times_count_only_beyond_their_noise(runs, seconds, judgement):
    """Quartiles that overlap: nobody knows."""
    pair = runs(
        [a_record(metrics={"step_time_s": step_time(1.0)})], [a_record(metrics={"step_time_s": step_time(seconds)})]
    )

    assert [judgement] == [change.judgement for change in compare(*pair).changes]


def test_throughput_is_as_sure_as_the_time_it_comes_from(runs):
    """tokens/s has no quartiles of its own."""

    def cell(tokens, seconds):
        return a_record(metrics={"step_time_s": step_time(seconds), "tokens_per_s": measured(tokens)})

    noise = compare(*runs([cell(100, 1.0)], [cell(98, 1.015)]), metrics=["tokens_per_s"])
    assert ["noise"] == [change.judgement for change in noise.changes]


def test_less_throughput_is_worse(runs):
    """The direction comes from the table of metrics."""

    def cell(tokens, seconds):
        return a_record(metrics={"step_time_s": step_time(seconds), "tokens_per_s": measured(tokens)})

    comparison = compare(*runs([cell(100, 1.0)], [cell(50, 2.0)]))

    assert {"step_time_s": "worse", "tokens_per_s": "worse"} == {c.metric: c.judgement for c in comparison.changes}


def test_a_cell_that_no_longer_fits_is_worse(runs):
    """ok to oom is a regression although no number can be compared."""
    comparison = compare(*runs([a_record(metrics={ACTIVATION: 1})], [a_record("oom")]))

    assert ["worse: bert-base@random/full/b8/s128: status ok -> oom"] == [c.text() for c in comparison.changes]
    assert (1, 0) == (exit_code(comparison, True), exit_code(comparison, False))


def test_what_became_nan_is_worse(runs):
    """A comparison with nan is false either way; it must not pass for an improvement."""

    def cell(value):
        return a_record(metrics={"reconstruction_rel_max": value})

    assert "worse" == compare(*runs([cell(0.5)], [cell(float("nan"))])).changes[0].judgement


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.1, 1.47e27, "0.1 -> 1.47e+27 counted (+1.47e+27)"),
        (0.1, math.nan, "0.1 -> nan counted"),
        (math.nan, 0.1, "nan -> 0.1 counted"),
        (0.1, math.inf, "0.1 -> inf counted"),
        (math.nan, math.nan, "nan counted, unchanged"),
        (math.inf, math.inf, "inf counted, unchanged"),
    ],
)
def test_what_collapsed_is_said_in_figures_that_can_be_read(runs, before, after, said):
    """No percentage of thirty digits, no difference that is not a number."""
    pair = runs(*([a_record(metrics={"gradient_rel_max": value})] for value in (before, after)))

    (change,) = compare(*pair).changes

    assert change.text().endswith(f"gradient_rel_max {said}")


def test_changes_to_nan_come_first_and_the_others_by_their_size(runs):
    """Whatever the order in which the records were written."""
    sizes = {"full": 2.0, "lora": math.nan, "parallel": 8.0, "houlsby": 4.0, "meft1": math.nan}
    error = "gradient_rel_max"
    first, second = (
        [a_record(method=method, metrics={error: value if changed else 1.0}) for method, value in sizes.items()]
        for changed in (False, True)
    )

    changes = [change for change in compare(*runs(first, second)).changes if change.metric == error]

    assert ["lora", "meft1", "parallel", "houlsby", "full"] == [change.label.split("/")[1] for change in changes]


def test_cells_of_one_run_alone_are_listed(runs):
    """A cell that is gone is not a cell that is the same."""
    pair = runs(
        [a_record(metrics={ACTIVATION: 1}), a_record(batch_size=1)],
        [a_record(metrics={ACTIVATION: 1}), a_record(batch_size=2)],
    )

    comparison = compare(*pair)

    assert ["bert-base@random/full/b1/s128"] == comparison.only_first
    assert ["bert-base@random/full/b2/s128"] == comparison.only_second
    assert "1 cell in both runs: 1 same; 1 only in the first; 1 only in the second" == comparison.summary()


def test_runs_without_a_common_cell_exit_5(runs):
    """Nothing compared is not "nothing changed"."""
    with pytest.raises(UserError, match="no cell is in both runs") as caught:
        compare(*runs([a_record()], [a_record(batch_size=1)]))

    assert 5 == caught.value.exit_code


def test_another_protocol_is_refused_and_named(runs):
    """Exit 4, with what differs."""
    pair = runs(
        [a_record(metrics={ACTIVATION: 1})],
        [a_record(protocol_id="protocol-2", metrics={ACTIVATION: 1})],
        protocol={"warmup": 0, "steps": 5},
    )

    with pytest.raises(UserError, match=r"different protocols \(warmup: 2 \| 0\)") as caught:
        compare(*pair)

    assert 4 == caught.value.exit_code


OTHER = {"comparable": {"machine": "x86_64", "cpu": "a CPU", "cores": 64, "packages": {"torch": "2.13.0"}, "gpus": []}}


def test_counted_bytes_are_compared_across_machines_and_times_are_left_out(runs):
    """What is left out is said."""
    metrics = {ACTIVATION: 1, "step_time_s": step_time(1.0)}
    pair = runs(
        [a_record(metrics=metrics)], [a_record(environment_id="environment-2", metrics=metrics)], environment=OTHER
    )

    comparison = compare(*pair)

    assert [ACTIVATION] == [change.metric for change in comparison.changes]
    assert ["1 measured numbers are left out: the environments differ (cores: 2 | 64)"] == comparison.notes


def test_measured_values_of_two_machines_are_refused(runs):
    """Exit 4 where they were asked for, naming the difference."""
    metrics = {ACTIVATION: 1, "step_time_s": step_time(1.0)}
    pair = runs(
        [a_record(metrics=metrics)], [a_record(environment_id="environment-2", metrics=metrics)], environment=OTHER
    )

    with pytest.raises(UserError, match=r"different environments \(cores: 2 \| 64\)") as caught:
        compare(*pair, metrics=["step_time_s"])

    assert 4 == caught.value.exit_code


def test_a_threshold_hides_smaller_changes(runs):
    """As a share of the value before."""
    pair = runs([a_record(metrics={ACTIVATION: 1000})], [a_record(metrics={ACTIVATION: 1020})])

    assert "same" == compare(*pair, threshold=0.02).changes[0].judgement
    assert "worse" == compare(*pair, threshold=0.019).changes[0].judgement


def test_an_unknown_metric_has_a_nearest_name(runs):
    """Exit 2, before anything is compared."""
    with pytest.raises(UserError, match="did you mean 'activation_peak_bytes'"):
        compare(*runs([a_record()], [a_record()]), metrics=["activation_peak_byte"])


@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_times_on_another_number_of_threads_are_not_compared(runs, threads):
    """One thread against two is no regression. Bytes and errors are compared; what differs is said first; told to,
    times are as well."""

    def cell(count, seconds):
        metrics = {"step_time_s": step_time(seconds), "tokens_per_s": measured(1 / seconds), ACTIVATION: 5}
        return a_record(metrics=metrics, observed={"threads": count})

    pair = runs([cell(threads[0], 1.0)], [cell(threads[1], 25.0)])
    found, told = compare(*pair), compare(*pair, across=True)
    why = f"CPU threads differ ({threads[0]} | {threads[1]})"

    assert [ACTIVATION] == [change.metric for change in found.changes]
    assert [f"2 measured numbers are left out: {why}"] == found.notes
    assert comparison_text(found).startswith(f"note: 2 measured numbers are left out: {why}\n")
    assert 0 == exit_code(found, True)
    assert {"step_time_s", "tokens_per_s", ACTIVATION} == {change.metric for change in told.changes}
    assert [f"compared although {why}"] == told.notes
    assert 1 == exit_code(told, True)
    with pytest.raises(UserError, match=r"not comparable: CPU threads differ.*--across") as refused:
        compare(*pair, metrics=["step_time_s"])
    assert 4 == refused.value.exit_code


@pytest.mark.parametrize("waited", [(0.02, 0.5), (0.5, 0.02), (0.11, 0.9)])
def test_times_that_were_taken_on_shared_cores_are_not_compared(runs, waited):
    """A step is fifteen times slower beside two busy threads: no regression. Bytes and errors are compared."""

    def cell(share, seconds):
        metrics = {"step_time_s": step_time(seconds), "cpu_wait_share": measured(share), ACTIVATION: 5}
        return a_record(metrics=metrics)

    pair = runs([cell(waited[0], 0.41)], [cell(waited[1], 6.09)])
    found, told = compare(*pair), compare(*pair, across=True)
    why = "cores were shared while timing (threads waited more than 10% of the time)"

    assert [ACTIVATION] == [change.metric for change in found.changes]
    assert [f"1 measured numbers are left out: {why}"] == found.notes
    assert 0 == exit_code(found, True)
    assert {"step_time_s", ACTIVATION} == {change.metric for change in told.changes}
    with pytest.raises(UserError, match=r"not comparable: cores were shared while timing.*--across"):
        compare(*pair, metrics=["step_time_s"])


@pytest.mark.parametrize("waited", [(0.0, 0.1), (None, 0.05), (None, None)])
def test_times_of_quiet_machines_are_compared(runs, waited):
    """Also beside runs from before it was recorded."""

    def cell(share, seconds):
        metrics = {"step_time_s": step_time(seconds)}
        return a_record(metrics=metrics | ({} if share is None else {"cpu_wait_share": measured(share)}))

    found = compare(*runs([cell(waited[0], 1.0)], [cell(waited[1], 2.0)]))

    assert [("step_time_s", "worse")] == [(change.metric, change.judgement) for change in found.changes]


def test_told_to_other_environments_are_compared(runs):
    """With the note of what differs."""
    pair = runs(
        [a_record(metrics={"step_time_s": step_time(1.0)}, environment_id="here")],
        [a_record(metrics={"step_time_s": step_time(2.0)}, environment_id="there")],
    )

    comparison = compare(*pair, across=True)

    assert ["worse"] == [change.judgement for change in comparison.changes]
    assert comparison.notes[0].startswith("compared although the environments differ (")


# --- numbers that the second run lacks ---

LOST = Metric(None, "counted", absent="the step was not traced")


@pytest.mark.parametrize("second", [{}, {ACTIVATION: LOST}])
def test_a_number_that_the_second_run_lost_is_worse(runs, second):
    """Nothing holds it any more, so that `--fail-on regression` exits 1, also where no other number is left."""
    pair = runs([a_record(metrics={ACTIVATION: 412 * MiB})], [a_record(metrics=second)])

    comparison = compare(*pair)

    why = "the step was not traced" if second else "it has no such metric"
    assert [f"412.0 MiB counted -> missing in the second run ({why})"] == [c.numbers() for c in comparison.changes]
    assert ["worse"] == [change.judgement for change in comparison.changes]
    assert 1 == exit_code(comparison, fail_on_regression=True)
    assert 1 == exit_code(compare(*pair, metrics=[ACTIVATION]), fail_on_regression=True)


def test_numbers_lost_for_one_reason_are_one_line(runs):
    """As changes of one cause are; a count that is neither better nor worse is a change."""
    kept = {"saved_bytes": 5}
    first = kept | {ACTIVATION: 412 * MiB, "peak_allocated_bytes": MiB, "parameters_total": 7}
    pair = runs([a_record(metrics=first)], [a_record(metrics=kept)])

    lines = comparison_text(compare(*pair)).splitlines()

    assert "peak_allocated_bytes 1.0 MiB counted -> missing in the second run (it has no such metric)" in lines[0]
    assert lines[0].endswith(f", and {ACTIVATION} likewise")
    assert lines[1].startswith("changed: ")
    assert "1 cell in both runs: 2 worse, 1 changed, 1 same" == lines[-1]


def test_a_number_new_in_the_second_run_is_no_change(runs):
    pair = runs([a_record(metrics={"saved_bytes": 5})], [a_record(metrics={"saved_bytes": 5, ACTIVATION: MiB})])

    assert [("saved_bytes", "same")] == [(c.metric, c.judgement) for c in compare(*pair).changes]


def test_a_number_of_another_source_is_said(runs):
    """It is not compared; where nothing else was asked for, the comparison is refused (exit 4)."""
    first = a_record(metrics={ACTIVATION: 412 * MiB, "saved_bytes": 5})
    pair = runs([first], [a_record(metrics={ACTIVATION: Metric(9, "predicted"), "saved_bytes": 5})])
    said = "were counted in the first run and are predicted in the second"

    (note,) = compare(*pair).notes
    with pytest.raises(UserError, match=said) as refused:
        compare(*pair, metrics=[ACTIVATION])

    assert said in note
    assert 4 == refused.value.exit_code


def test_measured_numbers_lost_in_another_environment_are_left_out(runs):
    """Whatever the other machine did not measure is no regression of the code."""
    first = a_record(metrics={"step_time_s": step_time(1.0), "saved_bytes": 5})
    pair = runs([first], [a_record(metrics={"saved_bytes": 5}, environment_id="environment-2")])

    comparison = compare(*pair)

    assert [("saved_bytes", "same")] == [(c.metric, c.judgement) for c in comparison.changes]
    assert comparison.notes[0].startswith("1 measured numbers are left out")


@pytest.mark.parametrize(("before", "after"), [(math.inf, "better"), (1e-7, "worse")])
def test_what_becomes_finite_is_better_and_what_becomes_infinite_worse(runs, before, after):
    """Of an infinite value every number is within any share, which must not make noise of it."""
    name, later = "reconstruction_rel_max", 1e-7 if before == math.inf else math.inf
    pair = runs([a_record(metrics={name: measured(before)})], [a_record(metrics={name: measured(later)})])

    assert [after] == [change.judgement for change in compare(*pair).changes]
