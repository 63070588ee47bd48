"""`meftbench check`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from builders import MiB, a_record, a_run, tear_last_line

METRIC = "activation_peak_bytes"


@pytest.fixture
def run(tmp_path):
    """A run of two cells: 430 MiB and 100 MiB."""
    records = [a_record(metrics={METRIC: 430 * MiB}), a_record(method="meft1", metrics={METRIC: 100 * MiB})]
    return a_run(tmp_path / "run", *records)


def budgets(tmp_path, *rows):
    file = tmp_path / "b.yaml"
    file.write_text("schema: 1\nbudgets:\n" + "".join(f"  - {row}\n" for row in rows))
    return file


def row(match="*", bound="412MiB", more=""):
    return f"{{match: '{match}', metric: {METRIC}, max: {bound}{more}}}"


def test_budgets_that_hold_exit_0(cli, run, tmp_path):
    """With the headroom of the tightest."""
    code, out, err = cli("check", run.path, "--budget", budgets(tmp_path, row(bound="431MiB")))

    assert (0, "") == (code, err)
    assert (
        "2 verdicts: 2 held; least headroom 1.0 MiB (0.2%, counted) in activation_peak_bytes of "
        "bert-base@random/full/b8/s128\n"
    ) == out


def test_a_budget_exceeded_exits_1_and_says_where(cli, run, tmp_path):
    """One line a violation, then the summary."""
    file = budgets(tmp_path, row())

    code, out, _ = cli("check", run.path, "--budget", file)

    assert 1 == code
    assert [
        f"{file}:3: bert-base@random/full/b8/s128: activation_peak_bytes 430.0 MiB (counted) is over max 412.0 MiB; "
        "over by 18.0 MiB (4.37%)",
        "2 verdicts: 1 over, 1 held; least headroom 312.0 MiB (75.7%, counted) in activation_peak_bytes of "
        "bert-base@random/meft1/b8/s128",
    ] == out.splitlines()


@pytest.mark.parametrize(
    ("rows", "arguments", "code"),
    [
        ([row("*/nowhere/*")], [], 5),
        ([row("*/nowhere/*"), row(bound="1GiB")], [], 5),
        ([row("*/nowhere/*"), row(bound="1GiB")], ["--missing", "warn"], 0),
        ([row("*/nowhere/*"), row(bound="1GiB")], ["--missing", "ignore"], 0),
        ([row(bound="1GiB", more=", environment: h200")], [], 4),
        ([row(bound="1GiB", more=", typo: 1")], [], 2),
    ],
)
def test_exit_codes(cli, run, tmp_path, rows, arguments, code):
    """Nothing matched, another machine, an invalid file: each has its own."""
    assert code == cli("check", run.path, "--budget", budgets(tmp_path, *rows), *arguments)[0]


def test_a_folder_that_is_no_run_exits_2(cli, tmp_path):
    """One line that names the cure."""
    code, out, err = cli("check", tmp_path, "--budget", budgets(tmp_path, row()))

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert "is not a run folder" in err


def test_a_run_without_budgets_exits_2(cli, run):
    """And says how to name them."""
    code, _, err = cli("check", run.path)

    assert 2 == code
    assert f"meftbench: {run.path}: its suite names no budgets; name a file with --budget\n" == err


def test_the_file_of_the_suite_comes_before_its_copy_in_the_run(cli, tmp_path):
    """Annotations name the file in the repository; the copy serves where that is gone."""
    file = budgets(tmp_path, row(bound=1))
    run = a_run(tmp_path / "run", a_record(metrics={METRIC: 5}), budgets=str(file))
    (run.path / "budgets.yaml").write_text(file.read_text())

    assert cli("check", run.path)[1].startswith("b.yaml:3: ")
    file.unlink()
    assert cli("check", run.path)[1].startswith(f"{run.path}/budgets.yaml:3: ")


def test_update_rewrites_the_bounds_and_shows_the_diff(cli, run, tmp_path):
    """Afterwards the same run holds."""
    file = budgets(tmp_path, row("*/full/*", more="}  # full"[:0]), row("*/meft1/*", bound=3))

    code, out, _ = cli("check", run.path, "--budget", file, "--update")

    assert 0 == code
    assert "-  - {match: '*/meft1/*', metric: activation_peak_bytes, max: 3}\n" in out
    assert "+  - {match: '*/meft1/*', metric: activation_peak_bytes, max: 100MiB}\n" in out
    assert 0 == cli("check", run.path, "--budget", file)[0]
    assert "nothing to update\n" == cli("check", run.path, "--budget", file, "--update")[1]


def test_every_format_has_the_same_verdicts(cli, run, tmp_path):
    """And the same exit code."""
    file = budgets(tmp_path, row())

    def printed(format_):
        code, out, _ = cli("check", run.path, "--budget", file, "--format", format_)
        assert 1 == code
        return out

    assert ["over", "held"] == [verdict["state"] for verdict in json.loads(printed("json"))]
    assert ("2", "1") == tuple(ElementTree.fromstring(printed("junit")).attrib[name] for name in ("tests", "failures"))
    assert printed("github").startswith(f"::error file={file},line=3,title=over budget::")
    assert "| over budget |" in printed("markdown")


def test_the_step_summary_is_written_for_github(cli, run, tmp_path, monkeypatch):
    """Only with that format."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))

    cli("check", run.path, "--budget", budgets(tmp_path, row()), "--format", "text")
    assert not (tmp_path / "summary.md").exists()
    cli("check", run.path, "--budget", budgets(tmp_path, row()), "--format", "github")
    assert "## Memory budgets of toy" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(("bound", "code"), [("412MiB", 1), ("500MiB", 0)])
def test_a_summary_that_cannot_be_written_hides_no_verdict(cli, run, tmp_path, monkeypatch, bound, code):
    """The variable names a folder: said on stderr, and the budgets decide how the command ends."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))

    ended, out, err = cli("check", run.path, "--budget", budgets(tmp_path, row(bound=bound)), "--format", "github")

    assert code == ended
    assert ("::error" in out) == bool(code)
    assert err.startswith("meftbench: GITHUB_STEP_SUMMARY: the step summary")


def test_output_goes_to_a_file(cli, run, tmp_path):
    """stdout stays empty, the exit code stays."""
    code, out, _ = cli("check", run.path, "--budget", budgets(tmp_path, row()), "--output", tmp_path / "o.txt")

    assert (1, "") == (code, out)
    assert "430.0 MiB" in (tmp_path / "o.txt").read_text()


def test_growth_against_a_baseline_run(cli, run, tmp_path):
    """`baseline: true` with --baseline RUN."""
    before = a_run(tmp_path / "before", a_record(metrics={METRIC: 400 * MiB}))
    grown = f"{{match: '*/full/*', metric: {METRIC}, baseline: true, max_increase: 1%}}"

    code, out, _ = cli("check", run.path, "--budget", budgets(tmp_path, grown), "--baseline", before.path)

    assert 1 == code
    assert "is over max_increase 404.0 MiB; over by 26.0 MiB" in out


def test_a_torn_last_line_is_said_on_stderr(cli, run, tmp_path):
    """The cell that was being written is not silently absent."""
    tear_last_line(run)

    assert "the last line is cut off" in cli("check", run.path, "--budget", budgets(tmp_path, row()))[2]
