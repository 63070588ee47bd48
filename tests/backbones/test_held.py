"""Layouts held against the model's own layers: a configuration whose layers differ is refused, whatever its family."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM

import meftbench
from meftbench.backbones import held, layouts_of
from meftbench.backbones.residual import Names, layer_types_differ
from meftbench.catalogue.backbones import BACKBONES, Backbone
from meftbench.errors import UserError
from tests.models import TINY, a_model

METHODS = ("parallel", "meft1-exact", "full+tiled_mlp")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
}


def a_decoder(kind, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | fields))


@pytest.fixture
def registered(monkeypatch):
    """Families entered into the catalogue as CONTRIBUTING says, by the layout of Llama."""
    monkeypatch.setattr(held, "_HELD", set())
    for kind in ("granite", "cohere", "olmo2", "mixtral"):
        monkeypatch.setitem(BACKBONES, kind, BACKBONES["llama"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("granite", {"residual_multiplier": 0.22}),  # the layer scales what a sub-layer adds
        ("granite", {"residual_multiplier": 1.01}),
        ("cohere", {}),  # attention and feed-forward beside each other
        ("olmo2", {}),  # norms after the work
    ],
)
def test_layers_that_differ_are_refused(registered, kind, fields, method):
    model = a_decoder(kind, **fields)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=rf"\(layer 0\): its sublayers, as the layout of '{kind}' has them, are not the"
    ):
        meftbench.apply_method(model, method)

    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_the_same_are_taken(registered, method):
    """A Granite whose residuals are not scaled is a Llama; what is scaled inside attention is attention's."""
    assert meftbench.apply_method(a_decoder("granite", residual_multiplier=1.0, attention_multiplier=0.1), method)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_holds(family, dtype, monkeypatch):
    """With dropout, whose numbers both draw alike; nothing of the model or the generator is changed by looking."""
    monkeypatch.setattr(held, "_HELD", set())
    model = a_model(3, dtype, family)
    modes, numbers = [module.training for module in model.modules()], torch.random.get_rng_state()

    held.check_held(model, layouts_of(model))

    assert len(held._HELD) == 1
    assert torch.equal(numbers, torch.random.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_layer_of_each_kind_is_held(monkeypatch):
    """Some layers of Gemma attend through a window: one that is wrong there alone is found."""
    monkeypatch.setattr(held, "_HELD", set())
    model = a_model(4, torch.float32, "gemma3", dropout=0.0)

    assert held._kinds(model, list(model.model.layers)) == {0, 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_in_several_places_is_one_line(method):
    model = a_model(3, torch.float32, "llama", dropout=0.0)
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UserError, match="LlamaDecoderLayer: is in the model's list of layers several times"):
        meftbench.apply_method(model, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapped", [checkpoint_wrapper, lambda layer: nn.Sequential(layer)])
def test_layers_in_wrappers_are_one_line(method, wrapped):
    model = a_model(2, torch.float32, "bert", dropout=0.0)
    for place, layer in enumerate(list(model.bert.encoder.layer)):
        model.bert.encoder.layer[place] = wrapped(layer)
    with pytest.raises(UserError, match="is a wrapper around BertLayer, and layers are run here in parts; apply the"):
        meftbench.apply_method(model, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "place"), [("bert", "bert.encoder.layer.0"), ("llama", "model.layers.0")])
def test_weights_that_are_not_finite_are_not_told_of_as_another_layer(family, place, method, monkeypatch):
    monkeypatch.setattr(held, "_HELD", set())
    model = a_model(2, torch.float32, family, dropout=0.0)
    norms = [module for module in model.get_submodule(place).modules() if "norm" in type(module).__name__.lower()]
    with torch.no_grad():
        norms[-1].weight.fill_(float("nan"))

    assert meftbench.apply_method(model, method)
    assert not held._HELD


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_layers_is_one_line(method):
    model = a_model(1, torch.float32, "llama", dropout=0.0)
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="the model has no layers; give one that has"):
        meftbench.apply_method(model, method)


EXCHANGED = Names(
    attention="self_attn",
    attention_norm="post_attention_layernorm",
    feed_forward="mlp",
    feed_forward_norm="input_layernorm",
    pre_norm=True,
).layout("layers", layers_differ=layer_types_differ)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["starcoder2", "granite"])
def test_norms_exchanged_are_seen_in_untrained_weights(kind, method, monkeypatch):
    """Norms of a new model are all ones: the layout is held against layers whose norms differ. Weights stay as they
    were, and a model of the same configuration that was taken before says nothing of one with other weights."""
    monkeypatch.setattr(held, "_HELD", set())
    monkeypatch.setitem(BACKBONES, kind, Backbone("tests.backbones.test_held:EXCHANGED", "norms exchanged"))
    for _ in range(2):
        model = a_decoder(kind, **({"residual_multiplier": 1.0} if kind == "granite" else {"residual_dropout": 0.0}))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UserError, match="are not the layer"):
            meftbench.apply_method(model, method)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", TINY)
def test_looking_changes_no_weight(family, monkeypatch):
    """Bit for bit, where the layout holds."""
    monkeypatch.setattr(held, "_HELD", set())
    model = a_model(2, torch.bfloat16, family)
    before = copy.deepcopy(model.state_dict())
    held.check_held(model, layouts_of(model))
    assert len(held._HELD) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
