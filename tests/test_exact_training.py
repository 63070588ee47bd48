"""The campaign that holds reversed training against reference autograd, in miniature and on a real task."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch

from task_data import DATA

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "reports" / "campaigns" / "exact_training.py"
RTE = DATA / "glue" / "rte"
PAIRS = [
    {"sentence1": "A plane takes off.", "sentence2": "An aeroplane is taking off.", "label": 5.0, "idx": 0},
    {"sentence1": "A man plays the flute.", "sentence2": "Rain fell on the harbour all night.", "label": 0.2, "idx": 1},
    {"sentence1": "Two dogs run.", "sentence2": "Two dogs are running over a field.", "label": 3.6, "idx": 2},
]


@pytest.fixture
def campaign():
    """The script's names. One thread, as the script's own default; afterwards it is what it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runpy.run_path(str(SCRIPT))
    torch.set_num_threads(threads)


@pytest.fixture
def pairs(tmp_path):
    """A folder with a data set of three pairs."""
    folder = tmp_path / "glue" / "pairs"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def test_the_campaign_in_miniature(tmp_path, pairs, campaign, capsys):
    """Each method is trained in all its arms at both depths and reported; after an interruption the rest is done."""
    out = tmp_path / "out"
    cases, methods = ["bert-tiny@random:1e-3", "bert-tiny@random-twice:5e-4"], ["meft3-exact", "meft3"]
    small = ["--steps", "3", "--batch-size", "2", "--length", "12", "--gradient-every", "2"]

    command = [str(out), "--data", str(pairs), "--cases", *cases, "--methods", *methods, *small]
    assert 0 == campaign["main"](command)

    table = pd.read_csv(out / "losses.csv")
    arms = table[["case", "method", "activations", "precision"]].drop_duplicates()
    assert 2 * (3 + 2) == len(arms)  # cases; an exact method has a float64 arm beside
    assert {0, 1, 2} == set(table.step)
    assert {(2, 1e-3), (4, 5e-4)} == set(zip(table.layers, table.learning_rate, strict=True))
    exact = table[(table.arithmetic == "exact") & (table.activations == "reversed")]
    assert {0, 2} == set(exact.step[exact.gradient_distance.notna()])
    assert (exact.same_weights_loss_difference.dropna() == 0).all()
    assert exact.gradient_distance.max() < 1e-5
    assert exact.weights_distance.max() < 1e-4
    text = (out / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "measured" in text
    assert "bert-tiny@random-twice:0.0005 meft3-exact: first loss bit-identical" in text
    assert (out / "exact-training.png").stat().st_size > 10_000
    assert "</svg>" in (out / "exact-training.svg").read_text()
    told = json.loads((out / "environment.json").read_text())
    assert torch.__version__ == told["packages"]["torch"]
    assert 1 == told["torch"]["threads"]
    assert "glue/pairs" == told["campaign"]["data"]["name"]

    written = (out / "losses.csv").read_bytes()
    (out / "losses.csv").write_text(table[table.method == "meft3-exact"].to_csv(index=False))
    assert 0 == campaign["main"](command)
    assert sorted(written.splitlines()) == sorted((out / "losses.csv").read_bytes().splitlines())
    assert 2 == campaign["main"]([*command, "--seed", "1"])
    assert "holds a campaign of other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no train.jsonl"),
        ("", "is empty"),
        ('{"sentence1": "no label"}\n', "train.jsonl:1: is no record with text and a label"),
        ('{"sentence1": "A", "label": 1}\nnot json\n', "train.jsonl:2: is no record with text and a label"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(tmp_path, campaign, capsys, content, said):
    """Exit code 2, one line that names the folder or the line, and nothing is written."""
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)

    assert 2 == campaign["main"]([str(tmp_path / "out"), "--data", str(tmp_path)])

    lines = capsys.readouterr().err.strip().splitlines()
    assert 1 == len(lines)
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_run_that_breaks_is_named_and_drawn(campaign):
    """A loss that is not finite is no small difference: summary and figure say from which step on."""
    rows = [
        (step, "m:0.001", "m", 12, 1e-3, "meft3", "float", activations, "fp32", loss)
        for activations, losses in (("reversed", [2.0, 1.5, float("nan")]), ("ordinary", [2.0, 1.0, 0.5]))
        for step, loss in enumerate(losses)
    ]
    table = pd.DataFrame(rows, columns=[*campaign["IDENTITY"], "loss"]).assign(
        **dict.fromkeys(campaign["DISTANCES"], float("nan"))
    )
    found = campaign["differences"](table)
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    campaign["plot_differences"](found, ax)

    assert [0.0, 0.5] == list(found.difference[:2])
    assert any("no longer finite from step 2" in sentence for sentence in campaign["_findings"](found))
    assert ["not finite"] == [text.get_text() for text in ax.texts]
    assert campaign["ZERO"] in [label.get_text() for label in ax.get_yticklabels()]


def test_real_layers_are_stacked_twice(campaign):
    """MiniLM's six layers stand twice, each with weights of its own, and everything around them is as it was."""
    single, twice = (campaign["_model"](name, num_labels=1, seed=0) for name in ("minilm", "minilm-twice"))

    layers = twice.bert.encoder.layer
    assert 12 == len(layers) == twice.config.num_hidden_layers
    for index, layer in enumerate(layers):
        for name, weight in single.bert.encoder.layer[index % 6].named_parameters():
            assert torch.equal(weight, layer.get_parameter(name))
    assert 12 * len(list(layers[0].parameters())) == len(list(layers.parameters()))
    assert torch.equal(single.classifier.weight, twice.classifier.weight)


@pytest.mark.skipif(not RTE.is_dir(), reason=f"no task data at {RTE}; set MEFTBENCH_DATA")
def test_exact_reversal_does_not_change_training(campaign):
    """MiniLM on RTE, dropout on: ten steps reversed and under plain autograd have the same losses to 1e-4."""
    task = campaign["read_task"](RTE, steps=10, batch_size=8, length=32, seed=0)

    case = campaign["Case"]("minilm", 1e-3)
    table = campaign["train"](case, "meft1-exact", task, gradient_every=0, seed=0, fp64=False)

    found = campaign["differences"](table)
    assert 10 == len(found)
    assert 0 == found.difference.iloc[0]
    assert found.relative.max() < 1e-4
    assert found.loss.nunique() > 1
