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


# --- several runs, and what comes first ---


@pytest.fixture
def three(tmp_path, pair):
    """The pair, and a third run in which meft1 is smaller than in the first."""
    records = [a_record(metrics={METRIC: 400 * MiB}), a_record(method="meft1", metrics={METRIC: 90 * MiB})]
    return (*pair, a_run(tmp_path / "c", *records).path)


def test_several_runs_are_columns_against_the_first(cli, three):
    """A line for each cell and metric; one that no run changed is left out on request."""
    code, out, _ = cli("compare", *three, "--only-changed")

    assert 0 == code
    assert [
        f"first: {three[0]}",
        f"run 2: {three[1]}",
        f"run 3: {three[2]}",
        "bert-base@random/meft1/b8/s128: activation_peak_bytes: "
        "run 2 worse: 100.0 MiB -> 110.0 MiB counted (+10.0 MiB, +10.00%) | "
        "run 3 better: 100.0 MiB -> 90.0 MiB counted (-10.0 MiB, -10.00%)",
        "run 2: 2 cells in both runs: 1 worse, 1 same",
        "run 3: 2 cells in both runs: 1 better, 1 same",
    ] == out.splitlines()
    assert "bert-base@random/full/b8/s128" in cli("compare", *three)[1]


def test_several_runs_have_every_format_and_one_exit_code(cli, three):
    """A regression in any of them is one."""
    content = json.loads(cli("compare", *three, "--json")[1])

    assert [str(path) for path in three[1:]] == [comparison["second"] for comparison in content["comparisons"]]
    assert "| cell | metric |" in cli("compare", *three, "--format", "markdown")[1]
    assert 1 == cli("compare", *three, "--format", "github")[1].count("::error")
    assert 1 == cli("compare", *three, "--fail-on", "regression")[0]
    assert 0 == cli("compare", three[0], three[2], three[2], "--fail-on", "regression")[0]


def test_what_differs_beside_the_numbers_comes_first(cli, tmp_path):
    """Software, machine and what was observed of cells, before any number."""
    metrics = {METRIC: MiB}
    first = a_run(tmp_path / "a", a_record(metrics=metrics, observed={"attention_used": "sdpa: math"}))
    comparable = {"machine": "x86_64", "cpu": "a CPU", "cores": 2, "packages": {"torch": "2.14.0"}, "gpus": []}
    second = a_run(
        tmp_path / "b",
        a_record(metrics=metrics, environment_id="environment-2", observed={"attention_used": "sdpa: flash"}),
        environment={"comparable": comparable},
    )

    _, out, _ = cli("compare", first.path, second.path)

    assert [
        "differs: environment packages.torch: 2.13.0 | 2.14.0",
        "differs: attention_used: sdpa: math | sdpa: flash (1 of 1 cells)",
    ] == out.splitlines()[:2]
    assert cli("compare", first.path, second.path, "--format", "github")[1].startswith("::notice title=the runs differ")
    assert 2 == len(json.loads(cli("compare", first.path, second.path, "--json")[1])["differs"])


def test_of_very_many_unchanged_numbers_some_are_listed(cli, tmp_path, monkeypatch):
    """The summary counts all of them."""
    monkeypatch.setattr("meftbench.report.render.comparisons._UNCHANGED_SHOWN", 2)
    records = [a_record(batch_size=size, metrics={METRIC: MiB}) for size in (1, 2, 3, 4, 5)]
    runs = [a_run(tmp_path / name, *records).path for name in ("a", "b")]

    lines = cli("compare", *runs)[1].splitlines()

    assert ["and 3 more that did not change (--json lists them)", "5 cells in both runs: 5 same"] == lines[2:]
