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
    assert "every figure is in the repository: --table reports/published/table.csv" in out
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
        (("a.pickle", "bert-tiny@random"), "a.pickle is a snapshot, and what was trained is not named whole"),
        (("a.pickle", "bert-tiny@random", "lora", "--batch-size", "2"), "what was trained is not named whole"),
        (("run", "bert-tiny@random", "lora"), "MODEL: is of a snapshot, and run is a run; leave MODEL out"),
        (("run", "--batch-size", "2"), "--batch-size: is of a snapshot, and run is a run; leave --batch-size out"),
        (("--published", "--table", "no.csv"), "no.csv: cannot be read"),
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
