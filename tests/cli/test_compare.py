"""`meftbench compare`: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest

from builders import MiB, a_record, a_run, measured, step_time

METRIC = "activation_peak_bytes"
KiB = 1024


@pytest.fixture
def pair(tmp_path):
    """Two runs: meft1 grew, full stayed."""

    def run(name, grown):
        records = [a_record(metrics={METRIC: 400 * MiB}), a_record(method="meft1", metrics={METRIC: grown * MiB})]
        return a_run(tmp_path / name, *records).path

    return run("a", 100), run("b", 110)


MODEL = "model: bert-base@random"
LINE = "worse: meft1/b8/s128: activation_peak_bytes 100.0 MiB -> 110.0 MiB counted (+10.0 MiB, +10.00%)"
SAME = "same: full/b8/s128: activation_peak_bytes 400.0 MiB counted, unchanged"
SUMMARY = "2 cells in both runs: 1 worse, 1 same"


def test_changes_are_lines_worst_first(cli, pair):
    """Without --fail-on a regression is news, not a failure. What is the same is counted; --all prints it."""
    left_out = "1 number is the same or within its noise (--all prints it)"

    assert (0, f"{MODEL}\n{LINE}\n{left_out}\n{SUMMARY}\n", "") == cli("compare", *pair)
    assert cli("compare", *pair) == cli("compare", *pair, "--only-changed")
    assert (0, f"{MODEL}\n{LINE}\n{SAME}\n{SUMMARY}\n", "") == cli("compare", *pair, "--all")
    assert (2, "") == cli("compare", *pair, "--all", "--only-changed")[:2]


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
    assert ["worse", "same"] == [change["judgement"] for change in content["changes"]]
    assert 1 == len(json.loads(cli("compare", *pair, "--json", "--only-changed")[1])["changes"])
    assert cli("compare", *pair, "--format", "github")[1].startswith("::error title=regressed::worse: bert-base")
    assert "| worse |" in cli("compare", *pair, "--format", "markdown")[1]


# --- several runs, and what comes first ---


@pytest.fixture
def three(tmp_path, pair):
    """The pair, and a third run in which meft1 is smaller than in the first."""
    records = [a_record(metrics={METRIC: 400 * MiB}), a_record(method="meft1", metrics={METRIC: 90 * MiB})]
    return (*pair, a_run(tmp_path / "c", *records).path)


def test_several_runs_are_columns_against_the_first(cli, three):
    """A line for each cell and metric; those that no run changed are counted."""
    code, out, _ = cli("compare", *three)

    assert 0 == code
    assert [
        MODEL,
        f"first: {three[0]}",
        f"run 2: {three[1]}",
        f"run 3: {three[2]}",
        "meft1/b8/s128: activation_peak_bytes: "
        "run 2 worse: 100.0 MiB -> 110.0 MiB counted (+10.0 MiB, +10.00%) | "
        "run 3 better: 100.0 MiB -> 90.0 MiB counted (-10.0 MiB, -10.00%)",
        "run 2: 2 cells in both runs: 1 worse, 1 same",
        "run 3: 2 cells in both runs: 1 better, 1 same",
        "2 numbers are the same or within their noise (--all prints them)",
    ] == out.splitlines()
    assert "full/b8/s128: activation_peak_bytes: run 2 same" in cli("compare", *three, "--all")[1]


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


@pytest.fixture
def grown(tmp_path):
    """Two runs of a cell that holds 64 KiB more at its peak, as five metrics say, and 1 KiB more before the step."""
    kib = {"peak_allocated_bytes": 500, "activation_peak_bytes": 400, "temporaries_bytes": 90, "saved_bytes": 70,
           "peak_requested_bytes": 499}  # fmt: skip

    def run(name, more):
        metrics = {metric: (size + more) * KiB for metric, size in kib.items()}
        return a_run(tmp_path / name, a_record(metrics=metrics | {"baseline_allocated_bytes": (9 + more // 64) * KiB}))

    return run("a", 0).path, run("b", 64).path


def test_one_change_of_memory_is_told_once(cli, grown):
    """The peak first, and how many other metrics changed by the same bytes; JSON has each of them."""
    label = "bert-base@random/full/b8/s128"
    peak = f"worse: {label}: peak_allocated_bytes 500.0 KiB -> 564.0 KiB counted (+64.0 KiB, +12.80%)"
    lines = cli("compare", *grown)[1].splitlines()

    assert [
        f"{peak}, and 4 metrics by the same 64.0 KiB",
        f"worse: {label}: baseline_allocated_bytes 9.0 KiB -> 10.0 KiB counted (+1.0 KiB, +11.11%)",
    ] == sorted(lines[:2], reverse=True)
    assert 2 == cli("compare", *grown, "--format", "github")[1].count("::error")
    assert 6 == len(json.loads(cli("compare", *grown, "--json")[1])["changes"])
    two = cli("compare", *grown, "--metric", METRIC, "--metric", "saved_bytes")[1]
    assert "(+64.0 KiB, +16.00%), and saved_bytes by the same 64.0 KiB\n" in two


def test_several_runs_tell_one_change_of_memory_once(cli, grown):
    """A row for each cause, not for each metric."""
    lines = cli("compare", *grown, grown[1])[1].splitlines()

    rows = [line for line in lines if line.startswith("bert-base@random/full/b8/s128: ")]
    assert ["baseline_allocated_bytes", "peak_allocated_bytes"] == sorted(row.split(": ")[1] for row in rows)


def test_a_time_and_its_speeds_are_told_once(cli, tmp_path):
    """They are one measurement."""

    def run(name, seconds):
        speeds = {"tokens_per_s": measured(100 / seconds), "samples_per_s": measured(1 / seconds)}
        return a_run(tmp_path / name, a_record(metrics={"step_time_s": step_time(seconds), **speeds})).path

    lines = cli("compare", run("a", 1.0), run("b", 2.0))[1].splitlines()

    (line,) = [line for line in lines if line.startswith("worse: ")]
    assert "step_time_s 1.00 s -> 2.00 s measured" in line
    assert line.endswith(", and tokens_per_s, samples_per_s likewise")


def test_an_unknown_metric_gets_a_few_names(cli, pair):
    """Not all eighty."""
    code, _, err = cli("compare", *pair, "--metric", "peak")

    assert 2 == code
    assert "the nearest: activation_peak_bytes, first_step_peak_allocated_bytes, host_pinned_peak_bytes, " in err
    assert "starting_loss" not in err
