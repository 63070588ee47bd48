"""`meftbench validate` of what others published, and which of its forms is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import a_record, a_run
from meftbench.catalogue.validated import validated_figures

TABLE = Path(__file__).resolve().parents[2] / "reports" / "published" / "table.csv"


def test_what_others_published_is_printed_without_the_repository(cli, tmp_path, monkeypatch):
    """The package carries the errors; every figure is in the repository, and where is said."""
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("validate", "--published")

    assert (0, "") == (code, err)
    assert "peak allocated, complete settings" in out
    assert "rules of torch 2.4, transformers 4.48" in out
    assert "every figure is in meftbench's repository: --table" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())


def test_every_figure_is_printed_from_the_table(cli):
    """Each of its rows, measured and predicted."""
    code, out, _ = cli("validate", "--published", "--table", TABLE)

    assert 0 == code
    assert "fms-2025-8-mistral-full-b4-peak" in out
    assert sum(line.startswith("    measured ") for line in out.splitlines()) == len(TABLE.read_text().splitlines()) - 1


def test_as_json_it_has_the_errors_and_the_figures(cli):
    code, out, _ = cli("validate", "--published", "--table", TABLE, "--json")
    answer = json.loads(out)

    assert 0 == code
    assert len(validated_figures().groups) == len(answer["groups"])
    assert {"id", "measured_bytes", "predicted_bytes"} - {"measured_bytes"} <= set(answer["figures"][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing is named to hold predictions against; name a run, or SNAPSHOT MODEL METHOD, or --published"),
        (("--published", "a.pickle"), "--published: is of no run or snapshot, and a.pickle is named"),
        (("other.csv",), "other.csv is a snapshot, and what was trained is not named whole"),
        (("a.pickle", "bert-tiny@random"), "a.pickle is a snapshot, and what was trained is not named whole"),
        (("a.pickle", "bert-tiny@random", "lora", "--batch-size", "2"), "what was trained is not named whole"),
        (("run", "bert-tiny@random", "lora"), "METHOD: is not of a run, and run is taken for one; leave METHOD out"),
        (
            ("run", "--batch-size", "2"),
            "--batch-size: is not of a run, and run is taken for one; leave --batch-size out",
        ),
        (("--published", "--device", "3"), "--device: --published takes no such option; leave --device out"),
        (("--published", "--save"), "--save: --published takes no such option; leave --save out"),
        (("--published", "--table", "no.csv"), "no.csv: there is no such file"),
        (("--published", "--table", "other.csv"), "other.csv: has no column id"),
    ],
)
def test_a_wrong_form_is_one_line(cli, tmp_path, monkeypatch, arguments, said):
    """Exit code 2, and what to write."""
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "run", a_record())
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")

    code, out, err = cli("validate", *arguments)

    assert (2, "") == (code, out)
    assert said in err
    assert 1 == len(err.splitlines())


def test_a_file_that_is_no_snapshot_is_one_line(cli, tmp_path):
    """Nothing is predicted before it was read."""
    (tmp_path / "a.pickle").write_text("not a pickle")
    shape = ("--batch-size", "2", "--sequence-length", "8", "--quiet")

    code, out, err = cli("validate", tmp_path / "a.pickle", "bert-tiny@random", "lora", *shape)

    assert (2, "") == (code, out)
    assert 1 == len(err.splitlines())


ROW = "a,complete,growth,{},{},{},t4,torch 2.13,somebody,notes"
HEAD = "id,setting,quantity,published_bytes,predicted_bytes,ratio,profile,rules,source,notes"


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (("many", "2", "1.0"), "cannot be read"),
        (("1", "2", "nan"), "has rows whose numbers are missing or too large"),
        (("", "2", "2"), "has rows whose numbers are missing or too large"),
        (("1", "2", "9" * 400), "has rows whose numbers are missing or too large"),
        (("1", "", "2"), "has rows whose numbers are missing or too large"),
    ],
)
def test_a_damaged_table_is_one_line(cli, tmp_path, numbers, said):
    """Exit code 2, whatever stands where a number should."""
    file = tmp_path / "table.csv"
    file.write_text(f"{HEAD}\n{ROW.format(*numbers)}\n")

    code, out, err = cli("validate", "--published", "--table", file)

    assert (2, "") == (code, out)
    assert said in err
    assert 1 == len(err.splitlines())


def test_a_table_that_is_no_file_is_one_line(cli, tmp_path):
    """A device would be read without an end."""
    code, _, err = cli("validate", "--published", "--table", "/dev/zero")

    assert 2 == code
    assert "is no file" in err


def test_signs_that_a_terminal_acts_on_are_shown_as_escapes(cli, tmp_path):
    """In names of a table, an escape and a mark that turns the line."""
    file = tmp_path / "table.csv"
    file.write_text(f"{HEAD}\n" + ROW.format(1, 2, 2.0).replace("a,", "a\x1b[31m\u202e,", 1) + "\n")

    code, out, _ = cli("validate", "--published", "--table", file)

    assert 0 == code
    assert r"a\x1b[31m\u202e" in out
    assert "\x1b" not in out
