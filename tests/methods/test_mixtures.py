"""Mixtures of experts, whose loss is more than cross-entropy where it is asked for: the model's own, or one line."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meftbench.errors import UserError
from meftbench.methods import prepare

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
KINDS = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
}


def a_mixture(kind, **said):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind], **said)).train()


def loss_and_gradients(model, **asked):
    ids = torch.arange(48).view(2, 24) % 119 + 1
    loss = model(input_ids=ids, labels=ids, **asked).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(trained, found, strict=True) if g is not None}


@pytest.mark.parametrize("asked_by", ["call", "configuration"])
@pytest.mark.parametrize("levers", ["+chunked_loss", "+checkpoint", "+checkpoint+chunked_loss"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_router_is_kept_with_its_gradient(kind, levers, asked_by):
    said = {"output_router_logits": True} if asked_by == "configuration" else {}
    asked = {"output_router_logits": True} if asked_by == "call" else {}
    model = a_mixture(kind, router_aux_loss_coef=10.0, **said)
    without = loss_and_gradients(copy.deepcopy(model), output_router_logits=False)
    expected = loss_and_gradients(copy.deepcopy(model), **asked)

    found = loss_and_gradients(prepare(model, f"full{levers}", {}).model, **asked)

    assert not torch.isclose(without[0], expected[0], atol=1e-2)
    assert torch.allclose(expected[0], found[0], atol=1e-5)
    assert list(expected[1]) == list(found[1])
    assert all(torch.allclose(expected[1][n], found[1][n], atol=1e-5) for n in expected[1])


@pytest.mark.parametrize("method", ["full+tiled_mlp", "lora+tiled_mlp", "meft1-exact", "meft3"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_give_it_says_so(kind, method):
    """A wrong loss or a gradient of zero would say nothing."""
    model = prepare(a_mixture(kind), method, {}).model
    loss_and_gradients(model)
    with pytest.raises(UserError, match="output_router_logits: "):
        loss_and_gradients(model, output_router_logits=True)
