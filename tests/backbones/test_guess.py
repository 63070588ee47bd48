"""Models without a layout: a guess that holds for every layer is taken, one that does not is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from meftbench.backbones import layouts_of
from meftbench.errors import UserError
from meftbench.methods import prepare
from tests.models import gradients, worst_relative_error

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def a_stranger(model_type, auto=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **(SMALL | more)), dtype=torch.float64).train()


def a_batch():
    ids = torch.randint(5, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@pytest.mark.parametrize("model_type", ["olmo", "stablelm", "starcoder2", "granite", "biogpt"])
def test_what_splits_as_known_layers_do_is_taken(model_type):
    """λ→0 and no adapters give the model's own logits; exact reversal gives the gradients of reference autograd."""
    model = a_stranger(model_type)
    batch = a_batch()
    model.eval()
    expected = model(**batch).logits
    model.train()
    applied = prepare(model, "meft1-exact", {"tiles": 3}, seed=1)
    loss, found = gradients(model, batch)
    with applied.reference_autograd():
        expected_loss, expected_gradients = gradients(model, batch)

    assert torch.equal(loss, expected_loss)
    assert worst_relative_error(found, expected_gradients) <= 1e-12

    near = prepare(a_stranger(model_type), "meft1", {"lambda": 1e-6, "output": "last"}, seed=1)
    near.zero_adapters()
    assert torch.allclose(expected, near.model.eval()(**batch).logits, atol=1e-4)


def test_one_that_is_built_as_bert_is():
    """ELECTRA's layers are BERT's by name."""
    size = {"embedding_size": 32}
    model = a_stranger("electra", AutoModelForSequenceClassification, **size)

    assert "encoder.layer" == layouts_of(model)[0].layers
    applied = prepare(model, "meft3-exact+tiled_mlp", {"reversible_layers": 1}, seed=1)
    batch = a_batch() | {"labels": torch.tensor([0, 1])}
    del batch["use_cache"]
    found = gradients(model, batch)[1]
    with applied.reference_autograd():
        assert worst_relative_error(found, gradients(model, batch)[1]) <= 1e-12


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gpt2", {}),  # queries, keys and values in one projection
        ("cohere", {}),  # attention and feed-forward side by side
        ("granite", {"residual_multiplier": 0.22}),  # the names are those of Llama, the residuals are not
    ],
)
def test_what_does_not_is_refused_with_what_to_write(model_type, more):
    """One line names the type, and what to write where; the model is left as it was."""
    model = a_stranger(model_type, **more)
    before = set(model.state_dict())

    with pytest.raises(UserError, match=rf"'{model_type}' do not split.*Names\(\.\.\.\).*BACKBONES.*CONTRIBUTING"):
        prepare(model, "meft1")

    assert before == set(model.state_dict())
