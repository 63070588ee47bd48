"""Reading a budgets file: strict, with file, line and cure."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from meftbench.catalogue.metrics import METRICS
from meftbench.errors import UserError
from meftbench.plan.budgets import Increase, glob, load_budgets


def budgets_at(tmp_path, text: str):
    file = tmp_path / "b.yaml"
    file.write_text(text)
    return load_budgets(file)


def one_row(tmp_path, row: str):
    return budgets_at(tmp_path, f"schema: 1\nbudgets:\n  - {row}\n").rows[0]


def test_the_example_of_the_specification_is_read(tmp_path):
    """Bounds in bytes, counts, shares and the row's settings, as docs/measuring.md 1 writes them."""
    budgets = budgets_at(
        tmp_path,
        """schema: 1
default: {tolerance: 0}                       # counted is exact; measured default 1%
budgets:
  - {match: "bert-base@random/*/b8/s128", metric: activation_peak_bytes, source: counted, max: 412MiB}
  - {match: "*/meft*/*", metric: reconstruction_rel_max, max: 0, when: {arithmetic: exact}}
  - {match: "*", metric: peak_allocated_bytes, source: measured, baseline: true, max_increase: 1%, environment: h200}
""",
    )

    assert [412 * 2**20, 0, None] == [row.max for row in budgets.rows]
    assert Increase(share=0.01) == budgets.rows[2].max_increase
    assert {"arithmetic": "exact"} == budgets.rows[1].when
    assert [4, 5, 6] == [budgets.line(index) for index in range(3)]
    assert (0.0, 0.01) == (
        budgets.tolerance(budgets.rows[0], "counted"),
        budgets.tolerance(budgets.rows[2], "measured"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{match: '*', metric: activation_peak_byte, max: 1}",
         "b.yaml:3: budgets[0].metric: unknown metric 'activation_peak_byte'; did you mean 'activation_peak_bytes'?"),
        ("{match: '*', metric: peak_allocated_bytes, maxx: 1}",
         "b.yaml:3: budgets[0].maxx: unknown key 'maxx'; did you mean 'max'?"),
        ("{match: '*', metric: peak_allocated_bytes, max: 1, max: 2}",
         "b.yaml:3: duplicate key 'max'; it stands on line 3 already: remove one"),
        ("{match: '*', metric: peak_allocated_bytes}", "the row has no bound"),
        ("{match: '*', metric: peak_allocated_bytes, max: 412}\n    x: 1", "not valid YAML"),
        ("{match: '*', metric: peak_allocated_bytes, max: 4 parsecs}", "'4 parsecs' is not an amount of memory"),
        ("{match: '*', metric: reconstruction_rel, max: 1}", "reconstruction_rel is not one number"),
        ("{match: '*', metric: peak_allocated_bytes, max: 1, when: {arithmetc: float}}",
         "b.yaml:3: budgets[0].when.arithmetc: unknown cell field 'arithmetc'; did you mean 'arithmetic'?"),
        ("{match: '*', metric: peak_allocated_bytes, max_increase: 1%}", "max_increase and baseline go together"),
        ("{match: '*', metric: peak_allocated_bytes, max: 1, expires: 2026-12-31}",
         "b.yaml:3: budgets[0].expires: expires and reason go together: a waived row says until when and why; it is "
         "2026-12-31"),
        ("{match: '*', metric: ooms, max: 1, expires: 2026-12-31, reason: ' '}", "budgets[0].reason"),
        ("{match: '*', metric: ooms, max: 1, reason: issue 7}", "expires and reason go together"),
        ("{match: '*', metric: ooms, max: 1, expires: soon, reason: issue 7}", "'soon' is not a date"),
        ("{match: '*', metric: ooms, max: 010}", "b.yaml:3: not valid YAML (010 would be read as 8: write that number"),
        ("{match: '*', metric: ooms, max: 1:30}", "b.yaml:3: not valid YAML (1:30 would be read as 90: write that"),
        ("{match: '*', metric: ooms, max: 1:30.5}", "(1:30.5 would be read as 90.5: write that number"),
        ("{match: '*', metric: peak_allocated_bytes, max: 1, warn: 2}", "warn is above max"),
        ("{match: '*', metric: peak_allocated_bytes, max: 1, missing: maybe}", "'error', 'warn' or 'ignore'"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_that_names_place_and_cure(tmp_path, row, message):
    """Wrong names, values and combinations are refused before anything is judged; exit code 2."""
    with pytest.raises(UserError) as caught:
        one_row(tmp_path, row)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 2 == caught.value.exit_code


def test_a_newer_schema_is_refused(tmp_path):
    """A file for a later program is not half understood."""
    with pytest.raises(UserError, match=r"b\.yaml:1: schema: schema 2 is newer than this program \(1\)"):
        budgets_at(tmp_path, "schema: 2\nbudgets: []\n")


def test_a_missing_file_is_named(tmp_path):
    """The message has the path."""
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_budgets(tmp_path / "nowhere.yaml")


def test_a_waived_row_has_its_date(tmp_path):
    """YAML dates are dates."""
    row = one_row(tmp_path, "{match: '*', metric: ooms, max: 0, expires: 2026-12-31, reason: known}")

    assert datetime.date(2026, 12, 31) == row.expires


@pytest.mark.parametrize(
    ("pattern", "label", "matches"),
    [
        ("*", "a/b/b8/s128", True),
        ("*/meft*/*", "bert/meft1/b8/s128", True),
        ("*/b8/s128", "bert/full/b8/s128/bf16-autocast", False),
        ("*/b?/*", "bert/full/b16/s1", False),
        ("x/lora(targets=['query'])/*", "x/lora(targets=['query'])/b1/s1", True),
        ("x/[ab]/*", "x/a/b1/s1", False),
    ],
)
def test_globs_know_stars_and_question_marks_only(pattern, label, matches):
    """Labels hold brackets, so brackets stand for themselves; a glob covers the whole label."""
    assert matches == bool(glob(pattern).fullmatch(label))


def test_no_shipped_bound_is_decided_by_the_rounding_of_one_processor():
    """Errors of floating-point sums differ by per cents from one processor to the next; a bound above 0 leaves room."""
    files = sorted(Path("suites").glob("*.budgets.yaml"))
    assert files
    for file in files:
        for row in load_budgets(file).rows:
            rounded = METRICS[row.metric].unit in ("ratio", "absolute", "loss")
            room = row.tolerance is not None and row.tolerance >= 1
            assert not rounded or not row.max or room, f"{file}: {row.match} {row.metric}"


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e400", "1" + 310 * "0", f'"1{310 * "0"}GiB"'])
@pytest.mark.parametrize("key", ["max", "min", "warn", "max_increase", "baseline", "baseline: {a", "tolerance"])
def test_a_bound_that_is_not_finite_is_refused(tmp_path, key, number):
    """It would hold whatever is measured, or nothing."""
    rest = {"max_increase": ", baseline: 1", "baseline": ", max_increase: 1", "baseline: {a": "}, max_increase: 1"}

    with pytest.raises(UserError) as refused:
        one_row(tmp_path, f"{{match: '*', metric: ooms, {key}: {number}{rest.get(key, ', min: 0' * (key != 'min'))}}}")

    assert str(refused.value).startswith(f"{tmp_path}/b.yaml:3: budgets[0].{key.partition(':')[0]}")


def test_a_number_with_a_zero_in_front_is_a_text_in_quotes_and_others_are_as_meant(tmp_path):
    """Hexadecimal numbers and underscores are in files on purpose; a zero alone is one."""
    for text, value in (("0", 0), ("0x10", 16), ("1_000", 1000), ("0.5", 0.5), ("'010 B'", 10), ("-0.5e1", -5.0)):
        assert value == one_row(tmp_path, f"{{match: '*', metric: ooms, max: {text}}}").max
