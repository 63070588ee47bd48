"""`meftbench estimate`: one cell's memory on a GPU that is not there."""

from __future__ import annotations

import json
import sys

import pytest

from meftbench.cli.estimate import folded, lines
from meftbench.estimates import Estimate
from meftbench.runner import predictions

SHAPE = ("--batch-size", "2", "--sequence-length", "16")
GiB = 2**30


def an_answer(**fields):
    """60 GiB of 80, all of it parameters."""
    given = {
        "label": "opt/full/b1/s8",
        "profile": "a100-80gb",
        "device": "A100",
        "verified": False,
        "validation": "not validated on this card; rules held against 7 published peaks",
        "rules": "torch 2.13",
        "memory_bytes": 80 * GiB,
        "context_bytes": GiB,
        "peak_allocated_bytes": 58 * GiB,
        "peak_reserved_bytes": 59 * GiB,
        "process_device_bytes": 60 * GiB,
        "headroom_bytes": 20 * GiB,
        "fits": True,
        "retries": 0,
        "peak_phase": "backward",
        "breakdown": {"parameters": 50 * GiB, "activations": 8 * GiB, "inputs": 0},
        "activation_peak_bytes": 8 * GiB,
        "parameters_trainable": 7,
        "parameters_total": 1000,
        "attention": ["flash"],
        "optimizer_paged_bytes": None,
        "predict_s": 2.0,
        "host_bytes": GiB,
        "step_s": 0.25,
        "tokens_per_s": 32.0,
        "time_parts": {"matrix": 0.2, "memory": 0.05, "transfers": 0.0},
        "time_absent": None,
        "time_validation": "not validated",
        "recomputed_flops_share": 0.25,
        "host_transfer_bytes": GiB,
    }
    return given | fields


@pytest.fixture
def answering(monkeypatch):
    """Answers in place of a prediction: the parent's part is tested without torch."""

    def answer(**fields):
        monkeypatch.setattr("meftbench.estimates._estimate_of", lambda *_: Estimate(**an_answer(**fields)))
        monkeypatch.setattr("meftbench.estimates.ask", lambda *_: {})

    return answer


def test_it_predicts_a_cell_and_says_of_what_the_peak_consists(cli):
    """The breakdown sums to the peak, to the byte; process is reserved and context; progress goes to stderr."""
    code, out, err = cli("estimate", "bert-tiny@random", "lora+checkpoint", *SHAPE, "--set", "rank=4", "--json")
    found = json.loads(out)

    assert 0 == code
    assert "bert-tiny@random/lora(rank=4)+checkpoint/b2/s16" in err
    assert found["peak_allocated_bytes"] == sum(found["breakdown"].values())
    assert found["process_device_bytes"] == found["peak_reserved_bytes"] + found["context_bytes"]
    assert found["headroom_bytes"] == found["memory_bytes"] - found["process_device_bytes"]
    assert 0 < found["activation_peak_bytes"] < found["peak_allocated_bytes"] <= found["peak_reserved_bytes"]
    assert 0 < found["parameters_trainable"] < found["parameters_total"]
    assert "a100-80gb" == found["profile"]


def test_what_the_prediction_refuses_is_one_line(cli):
    """The child's UserError is the parent's, with its exit code."""
    code, out, err = cli("estimate", "bert-tiny@random", "full", *SHAPE, "--allocator", "expandable:True", "-q")

    assert (2, "") == (code, out)
    assert "did you mean 'expandable_segments'?" in err
    assert 1 == len(err.splitlines())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("bert-tiny@random", "lora+chekpoint", *SHAPE), "estimate: method: unknown lever 'chekpoint'"),
        (("bert-tyny", "lora", *SHAPE), "estimate: model: unknown model 'bert-tyny'"),
        (("bert-tiny@random", "lora", "--batch-size", "2", "--sequence-length", "9999"), "512 positions"),
        (("bert-tiny@random", "lora", *SHAPE, "--micro-batch-size", "3"), "estimate: micro_batch_size: "),
        (("bert-tiny@random", "lora", *SHAPE, "--head", "causal_lm"), "has no head 'causal_lm'"),
        (("bert-tiny@random", "lora", *SHAPE, "--set", "r=4"), "estimate: method.r: unknown key 'r'"),
        (("bert-tiny@random", "lora", *SHAPE, "--set", "r"), "--set: 'r' is no setting; write key=value"),
        (("bert-tiny@random", "lora", *SHAPE, "--profile", "rtx409"), "estimate: profile: unknown profile 'rtx409'"),
    ],
)
def test_what_a_suite_refuses_is_refused_here_in_one_line(cli, given, said):
    code, out, err = cli("estimate", *given)

    assert (2, "") == (code, out)
    assert said in err
    assert 1 == len(err.splitlines())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"model_type": "bert", "hidden_act": "gelu_fancy"}', "transformers knows no 'gelu_fancy'"),
        ("[1]", "is no mapping of fields to values"),
    ],
)
def test_a_folder_that_transformers_cannot_build_is_our_line_alone(cli, tmp_path, config, reason):
    """Nothing that a library says stands before it on stderr."""
    (tmp_path / "config.json").write_text(config)

    code, out, err = cli("estimate", f"{tmp_path}@random", "full", *SHAPE, "-q")

    assert (2, "") == (code, out)
    assert reason in err
    assert str(tmp_path) in err
    assert 1 == len(err.splitlines())


@pytest.mark.parametrize(("fits", "asked", "code"), [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_too_big_is_an_answer_unless_it_is_to_fail(cli, answering, fits, asked, code):
    answering(fits=fits)

    assert code == cli("estimate", "bert-tiny@random", "full", *SHAPE, *["--fail-if-too-big"][:asked])[0]


def test_a_prediction_that_dies_is_a_bug_with_the_end_of_its_log(cli, monkeypatch):
    """In which nothing acts on the terminal."""
    printed = "no memory left \x1b[31mred \u202e"
    monkeypatch.setattr(predictions, "ONCE", (sys.executable, "-c", f"raise SystemExit({printed!r})"))

    code, _, err = cli("estimate", "bert-tiny@random", "full", *SHAPE)

    assert 70 == code
    assert r"no memory left \x1b[31mred \u202e" in err
    assert "\x1b" not in err


def test_every_number_is_said_to_be_predicted_and_whether_anybody_checked():
    said = lines(an_answer(), by_default=True)

    assert any(line.startswith("not validated on this card; rules held against 7 published peaks") for line in said)
    assert "rules of torch 2.13" in said
    assert any("(default; see --profile)" in line for line in said)
    assert all("predicted" in line for line in said if "GiB" in line and not line.startswith("on "))
    assert not any("inputs" in line for line in said)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (an_answer(), "fits, headroom 20.0 GiB"),
        (an_answer(fits=False, headroom_bytes=-3 * GiB), "does not fit: 3.0 GiB too much"),
        (an_answer(headroom_bytes=-3 * GiB, retries=2), "fits only as torch gives back what it has cached: 2 times"),
    ],
)
def test_the_verdict(answer, verdict):
    """As torch does: what is cached and not used is given back before a request fails."""
    assert any(line.strip().startswith(verdict) for line in lines(answer))


def test_what_is_said_fits_80_columns(cli, answering):
    """Piped there are 80; a label longer than that goes on in the next line, every character of it."""
    label = (
        "a-model@random(num_hidden_layers=48,attention_probs_dropout_prob=0.0)/meft1-exact(tiles=16)+chunked_loss/b8"
    )
    answering(label=label, headroom_bytes=-3 * GiB, retries=2)

    _, out, _ = cli("estimate", "bert-tiny@random", "full", *SHAPE)

    assert label in "".join(line.strip() for line in out.splitlines())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(len(line) <= 80 for line in lines(an_answer(), by_default=True))
    assert ["a line"] == folded(["a line"])
