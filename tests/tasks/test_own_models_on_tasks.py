"""A function of the user's own gives the model that is trained on a task."""

from __future__ import annotations

import pytest

from own_models import the_line
from trainings import NO_DROPOUT, TINY, a_choice, a_classification, a_training, losses, prepared, trained

LINES = """
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM


def classifier(num_labels=2, **more):
    return BertForSequenceClassification(BertConfig(vocab_size=30522, num_labels=num_labels, **more))


def decoder():
    tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30522, **tiny))


def own():
    return nn.Linear(2, 2)
"""


@pytest.fixture(autouse=True)
def _the_file(allowed):
    (allowed / "taught.py").write_text(LINES)


def a_cell(task, model, method="meft1-exact", **fields):
    own = {"model": f"taught:{model}", "attention_requested": "own"}
    return a_training(task, method, **own | {"model_config_overrides": {}} | fields)


def test_a_classifier_of_ones_own_is_trained_and_scored(tmp_path):
    """To the same losses as the same configuration under a model's name, since seed and weights are the same."""
    task = a_classification(tmp_path / "mood")
    config = TINY | NO_DROPOUT

    named, _ = trained(a_training(task, "lora", model="bert-tiny@random", seed=3))
    metrics, observed = trained(a_cell(task, "classifier", "lora", model_config_overrides=config, seed=3))

    assert losses(named) == losses(metrics)
    assert named["score"].value == metrics["score"].value
    assert 2 == observed["layers"]


def test_its_head_says_how_the_data_are_read(tmp_path):
    """A decoder answers questions by likelihood, where no head is named."""
    quality = prepared(a_cell(a_choice(tmp_path / "which"), "decoder"))

    assert "causal_lm" == quality.head
    assert quality.step().run() > 0


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("own", {}, "gives Linear, and 'mood' needs a transformers model for classification; return such a model, or"),
        ("decoder", {}, "gives LlamaForCausalLM, and 'mood' needs a transformers model for classification"),
        ("classifier", {"model_config_overrides": {"num_labels": 3}}, "of 3 labels, and 'mood' has 2; let it take num"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_answer_the_task(model, fields, said, tmp_path):
    assert said in the_line(prepared, a_cell(a_classification(tmp_path / "mood"), model, **fields))
