"""Mixtures of experts, whose loss is more than cross-entropy where it is asked for: the model's own, or one line."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from meftbench import unload
from meftbench.errors import UserError
from meftbench.methods import prepare
from tests.models import worst_relative_error

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


IDS = torch.arange(48).view(2, 24) % 119 + 1


def gradients_of(loss, model):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def loss_and_gradients(model, **asked):
    loss = model(input_ids=IDS, labels=IDS, **asked).loss
    return loss.detach(), gradients_of(loss, model)


def in_float64(model):
    """torch's product of groups of rows knows no float64, so that experts are run another way."""
    model.double().set_experts_implementation("batched_mm")
    return model


def routers_of(model):
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


def loss_by_hand(model, number_of_layers=2):
    """The loss without the routers', plus that of the logits that this test's own hooks see. Under reference autograd,
    where each router is called once a tile."""
    seen = {id(router): [] for router in routers_of(model)}
    handles = [
        router.register_forward_hook(lambda module, args, output: seen[id(module)].append(output[0]))
        for router in routers_of(model)
    ]
    loss = model(input_ids=IDS, labels=IDS, output_router_logits=False).loss
    for handle in handles:
        handle.remove()
    layers = tuple(torch.cat(tiles) for tiles in seen.values())
    assert number_of_layers == len(layers)
    return loss + 10.0 * load_balancing_loss_func(layers, 4, 2), layers


@pytest.mark.parametrize("asked_by", ["call", "configuration"])
@pytest.mark.parametrize("levers", ["+checkpoint", "+tiled_mlp", "+checkpoint+tiled_mlp+chunked_loss"])
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


SETTINGS = [
    ("meft1-exact", {"tiles": 3}),
    ("meft2-exact", {"tiles": 3}),
    ("meft3-exact", {"tiles": 1}),
    ("meft3", {"tiles": 3, "lambda": 0.5, "beta": 0.5}),
    ("meft3-exact", {"tiles": 3, "reversible_layers": 1}),
    ("meft3-exact", {"tiles": 3, "reversible_layers": 1, "reversible_at": "bottom"}),
    ("meft1-exact+tiled_mlp", {}),
    ("meft1-exact+checkpoint+chunked_loss", {"tiles": 3}),
    ("houlsby+tiled_mlp", {}),
    ("lora+tiled_mlp+checkpoint", {}),
]


@pytest.mark.parametrize(("number", "method", "settings"), [(n, *both) for n, both in enumerate(SETTINGS)])
def test_layers_that_run_again_give_it_with_its_gradient(number, method, settings):
    """Float64: 1e-12 of each tensor's gradient, against reference autograd with the routers' loss computed here."""
    kind = ("mixtral", "qwen3_moe")[number % 2]
    applied = prepare(in_float64(a_mixture(kind, router_aux_loss_coef=10.0)), method, settings, seed=1)
    model = applied.model
    without = loss_and_gradients(model, output_router_logits=False)[0]

    loss, found = loss_and_gradients(model, output_router_logits=True)
    with applied.reference_autograd():
        expected_loss, _ = loss_by_hand(model)
        expected = gradients_of(expected_loss, model)

    assert not torch.isclose(without, loss, atol=1e-2)
    assert torch.allclose(expected_loss, loss, rtol=1e-6)  # chunks add up in another order, in float32
    assert worst_relative_error(found, expected) <= (1e-6 if "chunked_loss" in method else 1e-12)


@pytest.mark.parametrize("method", ["meft1-exact", "meft2-exact", "meft3-exact"])
def test_it_may_be_the_whole_loss_and_may_be_asked_for_twice(method):
    """The hidden state then has no gradient; a second backward pass through one forward gives the same."""
    applied = prepare(in_float64(a_mixture("qwen3_moe")), method, {"tiles": 3}, seed=1)
    model = applied.model
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients_of_it():
        loss = model(input_ids=IDS, output_router_logits=True).aux_loss
        return [torch.autograd.grad(loss, trained, retain_graph=again, allow_unused=True) for again in (True, False)]

    first, second = gradients_of_it()
    with applied.reference_autograd():
        expected, _ = gradients_of_it()

    assert any(e is not None and e.norm() > 0 for e in expected)
    for one, two, e in zip(first, second, expected, strict=True):
        assert (one is None or float(one.norm()) == 0) if e is None else float((one - e).norm()) <= 1e-12 * e.norm()
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


@pytest.mark.parametrize("method", ["meft1", "meft1-exact", "full+tiled_mlp"])
def test_all_tokens_of_a_layer_are_together_and_routed_as_in_one_tile(method):
    """In float32, with the experts that transformers takes by default; and where no gradient is recorded."""
    settings = {"tiles": 5} if "meft" in method else {}
    applied = prepare(a_mixture("qwen3_moe"), method, settings, seed=1)
    for mode in (contextlib.nullcontext, torch.no_grad):
        with mode():
            found = applied.model(input_ids=IDS, output_router_logits=True).router_logits
        for stack in applied.stacks:
            stack.tiles = 1
        with applied.reference_autograd():
            _, expected = loss_by_hand(applied.model)
        for stack in applied.stacks:
            stack.tiles = 5

        assert [(48, 4)] * 2 == [tuple(logits.shape) for logits in found]
        for logits, expected_logits in zip(found, expected, strict=True):
            assert torch.allclose(expected_logits, logits, atol=1e-6)
            assert torch.equal(expected_logits.topk(2).indices, logits.topk(2).indices)


def test_what_is_given_dies_with_the_output():
    """No reference cycle holds it, and none of the layers' graphs."""
    model = prepare(a_mixture("mixtral"), "meft3-exact", {"tiles": 3}).model
    gc.collect()
    gc.disable()
    try:
        output = model(input_ids=IDS, labels=IDS, output_router_logits=True)
        first = weakref.ref(output.router_logits[0])
        output.loss.backward()
        del output
        assert first() is None
    finally:
        gc.enable()


def test_a_copy_gives_it_as_well_and_unloading_leaves_nothing():
    model = a_mixture("mixtral", router_aux_loss_coef=10.0)
    before = loss_and_gradients(copy.deepcopy(model), output_router_logits=True)[0]
    applied = prepare(model, "meft1-exact+tiled_mlp", {}, seed=1).model
    copied = pickle.loads(pickle.dumps(copy.deepcopy(applied)))
    expected = loss_and_gradients(applied, output_router_logits=True)

    found = loss_and_gradients(copied, output_router_logits=True)

    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(expected[1][name], gradient) for name, gradient in found[1].items())
    unloaded = unload(applied)
    assert torch.equal(before, loss_and_gradients(unloaded, output_router_logits=True)[0])
    assert "forward" not in vars(unloaded.model)


@pytest.mark.parametrize("method", ["full+tiled_mlp", "meft1-exact"])
def test_what_cannot_give_it_says_so(method):
    """A model whose own forward was replaced: a wrong loss or a gradient of zero would say nothing."""
    model = a_mixture("qwen3_moe")
    model.model.forward = partial(type(model.model).forward, model.model)
    model = prepare(model, method, {}).model
    loss_and_gradients(model)
    with pytest.raises(UserError, match="output_router_logits: "):
        loss_and_gradients(model, output_router_logits=True)
