"""Budgets held against runs: states, texts and exit codes."""

from __future__ import annotations

import datetime

import pytest

from builders import MiB, a_record, a_run, measured
from meftbench.plan.budgets import load_budgets
from meftbench.verdicts.judge import exit_code, judge

ACTIVATION = "activation_peak_bytes"


@pytest.fixture
def check(tmp_path):
    """Judge records against rows; the rows stand on lines 3, 4 ... of b.yaml."""

    def judged(records, *rows: str, default: str = "{}", **options):
        file = tmp_path / "b.yaml"
        file.write_text(f"schema: 1\ndefault: {default}\nbudgets:\n" + "".join(f"  - {row}\n" for row in rows))
        return judge(a_run(tmp_path / "run", *records), load_budgets(file), **options)

    return judged


def texts(verdicts, tmp_path):
    return [verdict.text().replace(f"{tmp_path}/", "") for verdict in verdicts]


def test_a_bound_is_held_to_the_byte(check):
    """Counted bytes have no tolerance: at the bound is held, one byte above is not."""
    records = [a_record(metrics={ACTIVATION: 400}), a_record(batch_size=16, metrics={ACTIVATION: 401})]

    verdicts = check(records, f"{{match: '*', metric: {ACTIVATION}, max: 400}}")

    assert ["over", "held"] == [verdict.state for verdict in verdicts]
    assert [-1, 0] == [verdict.headroom for verdict in verdicts]
    assert 1 == exit_code(verdicts)


def test_bytes_beyond_double_precision_are_told_apart(check):
    """2^53 + 1 is over 2^53, though a float cannot say so."""
    verdicts = check([a_record(metrics={ACTIVATION: 2**53 + 1})], f"{{match: '*', metric: {ACTIVATION}, max: {2**53}}}")

    assert ["over"] == [verdict.state for verdict in verdicts]


def test_a_bound_beyond_double_precision_holds_its_own_value(check):
    """2^53 + 1 as a float is 2^53, which the value would be over."""
    bound = 2**53 + 1

    verdicts = check([a_record(metrics={ACTIVATION: bound})], f"{{match: '*', metric: {ACTIVATION}, max: {bound}}}")

    assert ["held"] == [verdict.state for verdict in verdicts]


def test_a_violation_is_one_line_with_place_cell_values_and_excess(check, tmp_path):
    """Where the bound stands, which cell, value and source, bound, over by how much."""
    verdicts = check([a_record(metrics={ACTIVATION: 430 * MiB})], f"{{match: '*', metric: {ACTIVATION}, max: 412MiB}}")

    assert [
        "b.yaml:4: bert-base@random/full/b8/s128: activation_peak_bytes 430.0 MiB (counted) is over max 412.0 MiB; "
        "over by 18.0 MiB (4.37%)"
    ] == texts(verdicts, tmp_path)


def test_numbers_that_look_alike_are_written_in_full(check, tmp_path):
    """412.0 MiB over 412.0 MiB would be no message."""
    verdicts = check(
        [a_record(metrics={ACTIVATION: 412 * MiB + 1})], f"{{match: '*', metric: {ACTIVATION}, max: 412MiB}}"
    )

    assert "432,013,313 B (counted) is over max 432,013,312 B; over by 1 B" in texts(verdicts, tmp_path)[0]


def test_measured_values_have_one_percent(check):
    """Measured values do not repeat exactly; by default one percent over is held."""
    records = [
        a_record(device="cuda", batch_size=b, metrics={ACTIVATION: measured(v)}) for b, v in ((1, 1010), (2, 1011))
    ]

    verdicts = check(records, f"{{match: '*', metric: {ACTIVATION}, max: 1000}}", default="{tolerance: 0}")

    assert [("over", 1011), ("held", 1010)] == [(verdict.state, verdict.value) for verdict in verdicts]


def test_the_last_row_that_matches_wins(check):
    """A general row, then exceptions."""
    rows = (f"{{match: '*', metric: {ACTIVATION}, max: 1}}", f"{{match: '*/b8/*', metric: {ACTIVATION}, max: 9}}")

    verdicts = check([a_record(metrics={ACTIVATION: 5})], *rows)

    assert [("held", 5)] == [(verdict.state, verdict.line) for verdict in verdicts]


def test_a_row_without_a_cell_is_said_and_exits_5(check, tmp_path):
    """A typo in a glob must not look like a budget that is held."""
    verdicts = check([a_record(metrics={ACTIVATION: 5})], f"{{match: '*/meft9/*', metric: {ACTIVATION}, max: 9}}")

    assert ["b.yaml:4: */meft9/*: activation_peak_bytes matches no cell of the run (match '*/meft9/*')"] == texts(
        verdicts, tmp_path
    )
    assert 5 == exit_code(verdicts)


def test_ignoring_what_is_missing_does_not_make_an_empty_check_pass(check):
    """`missing: ignore` is for some rows; if nothing at all was judged the exit code still is 5."""
    rows = (f"{{match: '*/meft9/*', metric: {ACTIVATION}, max: 9, missing: ignore}}",)

    assert 5 == exit_code(check([a_record(metrics={ACTIVATION: 5})], *rows))
    assert 0 == exit_code(
        check([a_record(metrics={ACTIVATION: 5})], *rows, f"{{match: '*', metric: {ACTIVATION}, max: 9}}")
    )


@pytest.mark.parametrize(("missing", "code"), [("error", 5), ("warn", 0), ("ignore", 0)])
def test_a_metric_that_is_absent_follows_the_policy(check, missing, code):
    """A cell that ran, but has no such number."""
    rows = (f"{{match: '*', metric: {ACTIVATION}, max: 9}}", "{match: '*', metric: peak_reserved_bytes, max: 9}")

    verdicts = check([a_record(metrics={ACTIVATION: 5})], *rows, missing=missing)

    assert ["missing", "held"] == [verdict.state for verdict in verdicts]
    assert code == exit_code(verdicts)


@pytest.mark.parametrize(
    ("status", "state", "code"), [("oom", "oom", 1), ("error", "failed", 3), ("timeout", "failed", 3)]
)
def test_a_cell_that_did_not_end_ok_is_not_held(check, status, state, code):
    """Even with a number in its record: it is not the number of a finished cell."""
    record = a_record(status, metrics={ACTIVATION: 1}, status_detail={"message": "why", "requested_bytes": 2**30})

    verdicts = check([record], f"{{match: '*', metric: {ACTIVATION}, max: 9}}")

    assert [state] == [verdict.state for verdict in verdicts]
    assert code == exit_code(verdicts)
    assert ("asked for 1.0 GiB" if status == "oom" else "why") in verdicts[0].message


def test_one_failed_repeat_is_enough(check):
    """A cell is as good as its worst repeat."""
    records = [a_record(metrics={ACTIVATION: 1}), a_record("error", repeat=1)]

    assert ["failed"] == [v.state for v in check(records, f"{{match: '*', metric: {ACTIVATION}, max: 9}}")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_never_within_a_bound(check, value):
    """A reconstruction error of nan is the worst there is."""
    record = a_record(method="meft1", metrics={"reconstruction_rel_max": value})

    verdicts = check([record], "{match: '*', metric: reconstruction_rel_max, max: 1000000}")

    assert ["over"] == [verdict.state for verdict in verdicts]


def test_min_bounds_from_below(check, tmp_path):
    """Throughput may not fall."""
    record = a_record(metrics={"tokens_per_s": measured(900)})

    verdicts = check([record], "{match: '*', metric: tokens_per_s, min: 1000}")

    assert "900 tokens/s (measured) is under min 1,000 tokens/s; under by 100 tokens/s (10.00%)" in verdicts[0].text()
    assert -100 == verdicts[0].headroom


def test_warn_is_said_and_exits_0(check):
    """Near the bound is worth a word."""
    verdicts = check([a_record(metrics={ACTIVATION: 8})], f"{{match: '*', metric: {ACTIVATION}, max: 9, warn: 7}}")

    assert ["warned"] == [verdict.state for verdict in verdicts]
    assert 0 == exit_code(verdicts)


@pytest.mark.parametrize(("day", "state", "code"), [("2026-12-31", "waived", 0), ("2027-01-01", "over", 1)])
def test_a_waiver_ends(check, day, state, code):
    """Until the day it names, that day included; afterwards the row holds again and the text says why."""
    row = f"{{match: '*', metric: {ACTIVATION}, max: 9, expires: 2026-12-31, reason: issue 7}}"

    verdicts = check([a_record(metrics={ACTIVATION: 10})], row, today=datetime.date.fromisoformat(day))

    assert [state] == [verdict.state for verdict in verdicts]
    assert code == exit_code(verdicts)
    assert "issue 7" in verdicts[0].message
    assert (code == 1) == ("its waiver (issue 7) ended on 2026-12-31" in verdicts[0].text())


def test_when_looks_at_fields_levers_and_settings(check):
    """A row may be about a method's setting, which the label only shows where it is not the default."""
    records = [
        a_record(method="meft1", metrics={ACTIVATION: 10}),
        a_record(method="meft1", method_params={"adapter_size": 8}, metrics={ACTIVATION: 10}),
        a_record(method="lora+checkpoint", metrics={ACTIVATION: 10}),
    ]
    rows = (
        f"{{match: '*', metric: {ACTIVATION}, max: 9, when: {{adapter_size: 64, device: counted}}}}",
        f"{{match: '*', metric: {ACTIVATION}, max: 8, when: {{checkpoint: true}}}}",
    )

    assert [("bert-base@random/lora+checkpoint/b8/s128", 8), ("bert-base@random/meft1/b8/s128", 9)] == [
        (verdict.label, verdict.bound) for verdict in check(records, *rows)
    ]


@pytest.mark.parametrize(
    ("increase", "value", "state"),
    [("1%", 1010, "held"), ("1%", 1011, "over"), ("5", 1005, "held"), ("5", 1006, "over"), ("0", 1001, "over")],
)
def test_growth_is_bounded_against_a_recorded_baseline(check, increase, value, state):
    """A share of the baseline, or an amount."""
    row = f"{{match: '*', metric: {ACTIVATION}, baseline: 1000, max_increase: {increase}}}"

    assert [state] == [verdict.state for verdict in check([a_record(metrics={ACTIVATION: value})], row)]


def test_growth_is_bounded_against_another_run(check, tmp_path):
    """`baseline: true` takes the same cell of the baseline run; without one the number is missing."""
    before = a_run(tmp_path / "before", a_record(metrics={ACTIVATION: 1000}))
    records = [a_record(metrics={ACTIVATION: 1011}), a_record(batch_size=1, metrics={ACTIVATION: 7})]
    row = f"{{match: '*', metric: {ACTIVATION}, baseline: true, max_increase: 1%}}"

    verdicts = check(records, row, baseline=before)

    assert ["over", "missing"] == [verdict.state for verdict in verdicts]
    assert "over max_increase 1,010 B; over by 1 B" in verdicts[0].text()


def test_a_row_for_another_machine_exits_4(check):
    """A measured bound means nothing on another GPU."""
    record = a_record(device="cuda", metrics={ACTIVATION: measured(1)})
    row = f"{{match: '*', metric: {ACTIVATION}, max: 9, environment: h200}}"

    verdicts = check([record], row)

    assert ["elsewhere"] == [verdict.state for verdict in verdicts]
    assert 4 == exit_code(verdicts)
    assert "the row is for environment h200" in verdicts[0].message


def test_what_is_certain_decides_the_exit_code(check):
    """Over budget (1) comes before a failed cell (3) and a row without a cell (5); the worst stands first."""
    records = [
        a_record(metrics={ACTIVATION: 10}),
        a_record("error", batch_size=1),
        a_record(batch_size=2, metrics={ACTIVATION: 90}),
    ]
    rows = (f"{{match: '*', metric: {ACTIVATION}, max: 9}}", f"{{match: 'no', metric: {ACTIVATION}, max: 9}}")

    verdicts = check(records, *rows)

    assert [("over", 90), ("over", 10), ("failed", None), ("unmatched", None)] == [(v.state, v.value) for v in verdicts]
    assert 1 == exit_code(verdicts)
    assert 3 == exit_code(verdicts[2:])
    assert 5 == exit_code(verdicts[3:])
