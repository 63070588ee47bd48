"""Predictions from Python: the numbers that the command line prints, as objects and tables."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import meftbench
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


def test_torch_is_not_imported():
    """Neither by the names nor by what is asked."""
    code = (
        "import sys, meftbench\n"
        "meftbench.estimate('bert-tiny@random', 'lora', batch_size=1, sequence_length=8).to_json()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    assert 0 == subprocess.run([sys.executable, "-c", code]).returncode
