"""Predictions from Python: the numbers that the command line prints, as objects and tables."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import meftbench
from meftbench.asked import asked_cell
from meftbench.errors import UserError

SHAPE = {"batch_size": 2, "sequence_length": 16}


def test_an_estimate_is_what_the_command_line_prints(cli):
    """Every field but the time and the memory that the prediction took itself; and a table of one row."""
    found = meftbench.estimate(
        "bert-tiny@random", "meft1-exact+tiled_mlp", profile="t4", precision="bf16-autocast",
        config={"num_hidden_layers": 3}, settings={"adapter_size": 8}, **SHAPE,
    )  # fmt: skip
    code, out, _ = cli(
        "estimate", "bert-tiny@random", "meft1-exact+tiled_mlp", "--batch-size", 2, "--sequence-length", 16,
        "--profile", "t4", "--precision", "bf16-autocast", "--config", "num_hidden_layers=3", "--set", "adapter_size=8",
        "--json",
    )  # fmt: skip
    printed = json.loads(out)

    assert 0 == code
    assert printed.keys() == found.to_json().keys()
    for name in printed.keys() - {"predict_s", "host_bytes"}:
        assert printed[name] == found.to_json()[name], name
    (row,) = found.to_frame().to_dict("records")
    assert (found.peak_allocated_bytes, "predicted", True) == (row["peak_allocated_bytes"], row["source"], row["fits"])
    assert found.peak_allocated_bytes == sum(value for key, value in row.items() if key.startswith("breakdown_"))


def test_what_fits_is_a_table():
    """A row a method, question and card, as `meftbench fit --json` has them."""
    found = meftbench.fit(
        "bert-tiny@random", memory=["600MiB", 700 * 2**20], methods=["lora", "meft1-exact"], profile="t4",
        sequence_lengths=[64], batch_sizes=[2], jobs=2,
    )  # fmt: skip
    frame = found.to_frame()

    assert 2 * 2 * 2 == len(frame)
    assert {"lora", "meft1-exact"} == {*frame.method}
    assert {600 * 2**20, 700 * 2**20} == {*frame.memory_bytes} == {*found.cards}
    assert {("batch_size", 64), ("sequence_length", 2)} == {*zip(frame.asked, frame["at"], strict=True)}
    assert (frame.largest > 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert-tinny@random"}, "bert-tiny"),
        ({"method": "lorra"}, "lora"),
        ({"profile": "h10"}, "h100"),
        ({"settings": {"rank": 0}}, "rank"),
        ({"config": {"num_hidden_layer": 2}}, "num_hidden_layer"),
        ({"batch_size": 0}, "batch_size"),
        ({"sequence_length": "long"}, "sequence_length"),
        ({"precision": "bf61"}, "bf16"),
        ({"temperature": 1}, "temperature"),
        ({"allocator": "nonsense:1"}, "nonsense"),
        ({"allocator": None}, "allocator: None is not a text"),
        ({"profile": 3}, "profile: 3 is not a text"),
        ({"profile": None}, "profile: None is not a text"),
        ({"config": ["a"]}, "config: .* is not a mapping"),
        ({"config": "a=1"}, "config: .* is not a mapping"),
        ({"settings": ["rank"]}, "settings: .* is not a mapping"),
        ({"batch_size": 10**30}, "more than any device has held"),
        ({"seed": 3}, "unknown argument 'seed'"),
        ({"task": "mrpc"}, "unknown argument 'task'"),
        ({"device": "cuda"}, "unknown argument 'device'"),
    ],
)
def test_a_wrong_argument_is_one_line(changes, said):
    """As on the command line: what is wrong, and the nearest name."""
    asked = {"model": "bert-tiny@random", "method": "lora", **SHAPE, **changes}

    with pytest.raises(UserError, match=said) as error:
        meftbench.estimate(asked.pop("model"), asked.pop("method"), **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": "24"}, "not an amount of memory"),
        ({"memory": [1000]}, "no more than the context"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"sequence_lengths": [True]}, "sequence_lengths"),
        ({"methods": ["lora+chekpoint"]}, "checkpoint"),
        ({"methods": []}, "not a list of methods"),
        ({"methods": "lora"}, "not a list of methods"),
        ({"memory": None}, "not an amount of memory"),
        ({"memory": 2.0**30}, "not an amount of memory"),
        ({"memory": float("nan")}, "not an amount of memory"),
        ({"sequence_lengths": None}, "sequence_lengths: .None. is not a list of sizes"),
        ({"batch_sizes": "2"}, "batch_sizes: ..2.. is not a list of sizes"),
        ({"jobs": 0}, "jobs"),
        ({"jobs": "2"}, "jobs"),
        ({"batch_size": 3}, "did you mean 'batch'"),
        ({"settings": {}}, "unknown argument 'settings'"),
    ],
)
def test_a_wrong_question_of_what_fits_is_one_line(changes, said):
    """Before anything is predicted."""
    with pytest.raises(UserError, match=said):
        meftbench.fit("bert-tiny@random", **changes)


def test_a_run_is_a_table(tmp_path):
    """`run_suite` takes the name or the file of a suite; the run it gives back, and `load_run`, have a row a cell."""
    suite = tmp_path / "tiny.yaml"
    suite.write_text(
        "schema: 1\nname: tiny\nprotocol: {warmup: 1, steps: 1, passes: [memory]}\n"
        "grid: {model: bert-tiny@random, method: [lora, meft3-exact], batch_size: 2, sequence_length: 8}\n"
    )
    run = meftbench.run_suite(suite, tmp_path / "out")
    frame = meftbench.load_run(tmp_path / "out").to_frame()

    assert frame.equals(run.to_frame())
    assert ["lora", "meft3-exact"] == list(frame.method)
    assert (frame.activation_peak_bytes > 0).all()
    with pytest.raises(UserError, match="smoke"):
        meftbench.run_suite("smokee", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": None}, "None: is not a path"),
        ({"out": 3}, "3: is not a path"),
        ({"out": "a\0b"}, "cannot be a folder"),
        ({"out": "a" * 300}, "cannot be a folder"),
        ({"jobs": 0}, "jobs: 0 is not a whole number from 1"),
        ({"jobs": -2}, "jobs: -2"),
        ({"jobs": None}, "jobs: is None"),
        ({"jobs": 1.5}, "jobs: 1.5"),
        ({"limit": "1"}, "limit: '1'"),
        ({"limit": -1}, "limit: -1"),
        ({"retry": frozenset(["eror"])}, "did you mean 'error'"),
        ({"retry": "error"}, "not a set of statuses"),
        ({"where": "batch_size=8"}, "not a function of a cell"),
        ({"suite": 3}, "3"),
    ],
)
def test_a_wrong_option_of_a_run_is_one_line_and_writes_nothing(tmp_path, monkeypatch, changes, said):
    """Whatever it is, nothing is left of the folder."""
    monkeypatch.chdir(tmp_path)
    asked = {"suite": "smoke", "out": tmp_path / "out", **changes}
    with pytest.raises(UserError, match=said) as error:
        meftbench.run_suite(**asked)
    assert "\n" not in str(error.value)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, b"run", "a" * 5000, "a\0b", ""])
def test_a_run_that_is_none_is_one_line(path):
    with pytest.raises(UserError):
        meftbench.load_run(path)


def test_a_path_that_is_too_long_is_one_line(cli):
    """For every verb that takes one."""
    for command in (("show",), ("report",), ("check",), ("run", "smoke", "--out")):
        code, _, err = cli(*command, "a" * 5000)
        assert (2, 1) == (code, len(err.strip().splitlines())), command


def test_torch_is_not_imported():
    """Neither by the names nor by what is asked."""
    code = (
        "import sys, meftbench\n"
        "meftbench.estimate('bert-tiny@random', 'lora', batch_size=1, sequence_length=8).to_json()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    assert 0 == subprocess.run([sys.executable, "-c", code]).returncode


def test_a_method_and_a_model_may_be_mappings_as_in_a_suite():
    """A name beside its settings is what a name with `settings` is."""
    model = {"name": "bert-tiny@random", "config": {"num_hidden_layers": 1}}
    cells = [
        asked_cell("estimate", model, {"name": "lora", "rank": 4}, "t4", None, None, **SHAPE),
        asked_cell("estimate", model["name"], "lora", "t4", model["config"], {"rank": 4}, **SHAPE),
        asked_cell("estimate", {"name": model["name"]}, {"name": "lora"}, "t4", model["config"], {"rank": 4}, **SHAPE),
    ]

    assert 1 == len({cell.cell_id for cell in cells})
    assert {"rank": 4} == cells[0].method_params


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2", True])
def test_jobs_that_are_no_number_of_processes(jobs):
    with pytest.raises(UserError, match=f"jobs: {jobs!r} is no number of processes; give a whole number from 1"):
        meftbench.fit("bert-tiny@random", jobs=jobs)


def test_a_prediction_that_is_killed_is_one_line(monkeypatch):
    """By somebody, or by the kernel where the host has no memory left: no bug, and exit code 3."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr("meftbench.runner.predictions.ONCE", (sys.executable, "-c", code))

    with pytest.raises(UserError, match=r"ended by signal 9, SIGKILL: was killed .*, not by the kernel") as raised:
        meftbench.estimate("bert-tiny@random", "lora", **SHAPE)
    assert 3 == raised.value.exit_code
