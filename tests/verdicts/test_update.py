"""`check --update`: new numbers, everything else byte for byte as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_record, a_run, measured
from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.errors import UserError
from meftbench.plan.budgets import load_budgets
from meftbench.verdicts.judge import exit_code, judge
from meftbench.verdicts.update import updated

FILE = """# our bounds
schema: 1
budgets:
  - {match: "*/full/*", metric: activation_peak_bytes, max: 400MiB}   # the largest
  - match: "*/meft1/*"
    metric: activation_peak_bytes
    max: 7  # was 8
  - {match: "*", metric: tokens_per_s, min: 1}
  - {match: "*/lora/*", metric: activation_peak_bytes, max: 3}
"""


def test_numbers_change_and_comments_stay(tmp_path):
    """The largest value over a row's cells, whole MiB by name; rows that cannot be judged are kept, with a reason."""
    file = tmp_path / "b.yaml"
    file.write_text(FILE)
    run = a_run(
        tmp_path / "run",
        a_record(metrics={"activation_peak_bytes": 2**21}),
        a_record(batch_size=1, metrics={"activation_peak_bytes": 5}),
        a_record(method="meft1", metrics={"activation_peak_bytes": 1_234_567}),
        a_record("oom", method="lora"),
    )

    update = updated(run, load_budgets(file))
    update.write()

    assert FILE.replace("400MiB", "2MiB").replace("max: 7 ", "max: 1234567 ") == file.read_text()
    assert [f"{file}:9: kept: bert-base@random/lora/b8/s128 ended oom or has no activation_peak_bytes"] == update.kept
    assert "-    max: 7  # was 8\n+    max: 1234567  # was 8\n" in update.diff()


def test_line_ends_and_letters_outside_ascii_survive(tmp_path):
    """Offsets count characters as they stand in the file."""
    file = tmp_path / "b.yaml"
    text = "# größer → 🙂\r\nschema: 1\r\nbudgets:\r\n  - {match: '*', metric: ooms, max: 5}\r\n"
    file.write_bytes(text.encode())

    updated(a_run(tmp_path / "run", a_record(metrics={"ooms": 0})), load_budgets(file)).write()

    assert text.replace("max: 5", "max: 0").encode() == file.read_bytes()


def test_a_bound_that_is_shared_through_an_anchor_is_kept(tmp_path):
    """Changing it for one row would change it for the other."""
    file = tmp_path / "b.yaml"
    rows = "  - {match: '*', metric: ooms, max: &n 5}\n  - {match: '*/b9/*', metric: ooms, max: *n }\n"
    text = f"schema: 1\nbudgets:\n{rows}"
    file.write_text(text)

    update = updated(a_run(tmp_path / "run", a_record(metrics={"ooms": 0})), load_budgets(file))

    assert text == update.after
    assert 2 == len(update.kept)


NUMBERS = st.one_of(
    st.integers(0, 2**60),
    st.integers(0, 2**30).map(lambda mib: mib * 2**20),
    st.floats(0, 9e299, allow_nan=False, allow_infinity=False),
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=4), exact=st.booleans())
def test_an_updated_budget_holds_on_its_run_and_not_on_more(values, exact):
    """Whatever the numbers: what --update writes is read back as the same bound, and one byte more is over it."""
    metric = "activation_peak_bytes"
    if exact:
        values = [int(value) for value in values]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "b.yaml"
        file.write_text(f"schema: 1\nbudgets:\n  - {{match: '*', metric: {metric}, max: 1KiB}}\n")
        records = [a_record(batch_size=i + 1, metrics={metric: value}) for i, value in enumerate(values)]
        run = a_run(folder / "run", *records)

        updated(run, load_budgets(file)).write()

        assert 0 == exit_code(judge(run, load_budgets(file)))
        if exact:
            more = a_run(folder / "more", a_record(metrics={metric: max(values) + 1}))
            assert ["over"] == [verdict.state for verdict in judge(more, load_budgets(file))]


def test_a_bound_that_could_not_be_read_is_not_written(tmp_path):
    """A record may hold what is more than a bound may be: the row is kept, and the reason said."""
    file = tmp_path / "b.yaml"
    file.write_text(text := "schema: 1\nbudgets:\n  - {match: '*', metric: step_time_s, max: 1}\n")
    run = a_run(tmp_path / "run", a_record(metrics={"step_time_s": measured(1e300)}))

    update = updated(run, load_budgets(file))

    assert text == update.after
    assert [f"{file}:3: kept: 1e+300 is more than a bound may be"] == update.kept


def test_updating_twice_changes_nothing(tmp_path):
    """Small floats too: YAML reads 1e-05 as text, so it is written 1.0e-05."""
    file = tmp_path / "b.yaml"
    file.write_text("schema: 1\nbudgets:\n  - {match: '*', metric: reconstruction_rel_max, max: 1}\n")
    run = a_run(tmp_path / "run", a_record(metrics={"reconstruction_rel_max": measured(1e-05)}))

    updated(run, load_budgets(file)).write()

    assert "max: 1.0e-05}" in file.read_text()
    assert "" == updated(run, load_budgets(file)).diff()


def updated_text(folder, text, value=7):
    """The text of a budgets file after its update from a run whose peaks are `value`, and the rows that were kept."""
    file = folder / "b.yaml"
    file.write_text(text)
    metrics = {"peak_allocated_bytes": value, "activation_peak_bytes": value}
    update = updated(a_run(folder / "run", a_record(metrics=metrics)), load_budgets(file))
    update.write()
    return file.read_text(), update.kept


@pytest.mark.parametrize("block", ["|-\n    5MiB", ">-\n    5MiB\n", "&a |-\n    5MiB", '"5\\\n      MiB"'])
def test_a_bound_over_several_lines_is_kept(tmp_path, block):
    """The row after it is updated, and the file stays YAML."""
    rows = 'schema: 1\nbudgets:\n- match: "*"\n  metric: peak_allocated_bytes\n  max: {}\n# a note\n{}'
    other = '- {{match: "*", metric: activation_peak_bytes, max: {}}}\n'

    text, kept = updated_text(tmp_path, rows.format(block, other.format(5)))

    assert rows.format(block, other.format(7)) == text
    assert [f"{tmp_path}/b.yaml:3: kept: its max is written over several lines: write it on one"] == kept


def test_a_name_of_the_run_over_several_lines_is_kept(tmp_path):
    head = 'schema: 1\nupdated_from: >-\n  old\nbudgets: [{match: "*", metric: peak_allocated_bytes, max: '

    text, kept = updated_text(tmp_path, head + "5}]\n")

    assert head + "7}]\n" == text
    assert [f"{tmp_path}/b.yaml:2: kept: updated_from is written over several lines: write it on one"] == kept


def test_nothing_is_written_that_would_not_be_read_as_meant(tmp_path, monkeypatch):
    """Whatever goes wrong with the offsets in the text: one line, and the file as it was."""
    monkeypatch.setattr("meftbench.verdicts.update._spans", lambda text: {("budgets", 0, "max"): (0, 3)})

    with pytest.raises(UserError, match=r"b\.yaml: cannot be updated without changing more than its bounds"):
        updated_text(tmp_path, FILE)

    assert FILE == (tmp_path / "b.yaml").read_text()


ON_ONE_LINE = ["5", '"5 B"', "'5 B'", "5.0", "!!int 5", "&a 5", "\n    5", "  # note\n    5"]
OVER_SEVERAL = ["|-\n    5 B", ">\n    5 B\n", "&a |\n    5 B\n\n"]


@given(st.lists(st.sampled_from(ON_ONE_LINE + OVER_SEVERAL), min_size=1, max_size=len(BREAKDOWN)), st.booleans())
@settings(deadline=None)
def test_however_bounds_are_written_the_file_is_read_with_new_ones(written, noted):
    """Each row has the run's value, or its own where it is kept; what stands after it is another row's."""
    note = "# a note\n" if noted else ""
    rows = [
        f'- match: "*"\n  metric: {name}\n  max: {text}\n{note}' for name, text in zip(BREAKDOWN, written, strict=False)
    ]
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "b.yaml"
        file.write_text("schema: 1\nbudgets:\n" + "".join(row.replace("&a", f"&a{i}") for i, row in enumerate(rows)))
        run = a_run(Path(name) / "run", a_record(metrics=dict.fromkeys(BREAKDOWN, 7)))
        updated(run, load_budgets(file)).write()
        read = [row.max for row in load_budgets(file).rows]

    assert [5 if text in OVER_SEVERAL else 7 for text in written] == read
