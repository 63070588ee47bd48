"""`meftbench compare`: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest

from builders import MiB, a_record, a_run

METRIC = "activation_peak_bytes"


@pytest.fixture
def pair(tmp_path):
    """Two runs: meft1 grew, full stayed."""

    def run(name, grown):
        records = [a_record(metrics={METRIC: 400 * MiB}), a_record(method="meft1", metrics={METRIC: grown * MiB})]
        return a_run(tmp_path / name, *records).path

    return run("a", 100), run("b", 110)


LINE = (
    "worse: bert-base@random/meft1/b8/s128: activation_peak_bytes 100.0 MiB -> 110.0 MiB counted (+10.0 MiB, +10.00%)"
)
SAME = "same: bert-base@random/full/b8/s128: activation_peak_bytes 400.0 MiB counted, unchanged"
SUMMARY = "2 cells in both runs: 1 worse, 1 same"


def test_changes_are_lines_worst_first(cli, pair):
    """Without --fail-on a regression is news, not a failure."""
    assert (0, f"{LINE}\n{SAME}\n{SUMMARY}\n", "") == cli("compare", *pair)
    assert (0, f"{LINE}\n{SUMMARY}\n", "") == cli("compare", *pair, "--only-changed")


def test_a_regression_fails_when_asked_to(cli, pair):
    """In one direction only."""
    assert 1 == cli("compare", *pair, "--fail-on", "regression")[0]
    assert 0 == cli("compare", *reversed(pair), "--fail-on", "regression")[0]
    assert 0 == cli("compare", *pair, "--fail-on", "regression", "--threshold", "10%")[0]


def test_nothing_in_common_exits_5(cli, pair, tmp_path):
    """One line."""
    other = a_run(tmp_path / "c", a_record(batch_size=1)).path

    code, out, err = cli("compare", pair[0], other)

    assert (5, "", 1) == (code, out, err.count("\n"))


def test_another_protocol_exits_4(cli, pair, tmp_path):
    """And says what differs."""
    other = a_run(tmp_path / "c", a_record(protocol_id="p2"), protocol={"warmup": 1, "steps": 5}).path

    code, _, err = cli("compare", pair[0], other)

    assert 4 == code
    assert "different protocols (warmup: 2 | 1)" in err


@pytest.mark.parametrize("arguments", [("--threshold", "much"), ("--metric", "activation_peak"), ("--format", "xml")])
def test_wrong_options_exit_2(cli, pair, arguments):
    """One line each."""
    code, out, err = cli("compare", *pair, *arguments)

    assert (2, "", 1) == (code, out, err.count("\n"))


def test_formats(cli, pair):
    """The same changes for machines."""
    content = json.loads(cli("compare", *pair, "--json")[1])

    assert {"worse": 1, "better": 0, "changed": 0, "noise": 0, "same": 1} == content["counts"]
    assert 10 * MiB == content["changes"][0]["delta"]
    assert cli("compare", *pair, "--format", "github")[1].startswith("::error title=regressed::worse: bert-base")
    assert "| worse |" in cli("compare", *pair, "--format", "markdown")[1]
