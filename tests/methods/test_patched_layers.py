"""Layers that others have hooked or patched before a method runs them in parts: the method's model computes what the
user's did, or says in a line that it cannot."""

from __future__ import annotations

import copy
import functools
import warnings
from types import MethodType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import meftbench
from meftbench.errors import UserError
from meftbench.methods.bottleneck import Bottleneck
from tests.models import a_batch_for, a_model

FAMILIES = ("bert", "llama", "opt", "bart", "vit")
MODELS = {family: a_model(2, torch.float32, family, dropout=0.0).eval() for family in FAMILIES}
# The parts of a layer, by family: the modules somebody may have worked on.
INSIDE = {
    family: [name for name, _ in model.named_modules() if ".1" in name and ("layer.1" in name or "layers.1" in name)]
    for family, model in MODELS.items()
}


def changed(output):
    """Three quarters of a module's output, in whatever it is handed over."""
    return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else output * 0.75


def mixed(output):
    """Tokens see each other."""
    if isinstance(output, tuple):
        return (mixed(output[0]), *output[1:])
    return output + output.mean(-2, keepdim=True)


def by_hook(module):
    module.register_forward_hook(lambda _, __, output: changed(output))


def by_method(module):
    kind = type(module)
    module.forward = MethodType(lambda self, *args, **kwargs: changed(kind.forward(self, *args, **kwargs)), module)


def by_function(module):
    before = module.forward
    module.forward = lambda *args, **kwargs: changed(before(*args, **kwargs))


def by_mixing(module):
    kind = type(module)
    module.forward = MethodType(lambda self, *args, **kwargs: mixed(kind.forward(self, *args, **kwargs)), module)


PATCHES = [by_hook, by_method, by_function, by_mixing]


def patched(family, name, patch):
    model = copy.deepcopy(MODELS[family])
    patch(model.get_submodule(name))
    return model


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def check(family, name, patch, method):
    """Raises AssertionError where the patch is left out, or seen otherwise, without a word."""
    model = patched(family, name, patch)
    batch = a_batch_for(model)
    expected, unpatched = logits(model, batch), logits(MODELS[family], batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuned = meftbench.apply_method(model, method, **({"tiles": 3} if "meft" in method else {}))
        except UserError as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert type(model.get_submodule(name)).__name__ in refusal
        assert torch.equal(logits(model, batch), expected)
        return
    if any("will not be called" in str(warning.message) for warning in caught):
        return
    for module in tuned.modules():
        if isinstance(module, Bottleneck):
            module.zero()
    found = logits(tuned, batch)
    if "meft" in method:  # it starts near, not at, what the model computes
        without = copy.deepcopy(MODELS[family])
        start = logits(meftbench.apply_method(without, method, tiles=3), batch)
        assert torch.equal(expected, unpatched) or not torch.equal(found, start)
    else:
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


METHODS = ["parallel", "houlsby", "full+tiled_mlp", "parallel+tiled_mlp", "meft1-exact", "meft3-exact"]


# OPT's layer gives its feed-forward all samples in a row, its sublayers do not.
IN_A_ROW = ("fc1", "fc2", "activation_fn", "final_layer_norm")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_patch_is_met_or_said(data):
    family = data.draw(st.sampled_from(FAMILIES))
    name = data.draw(st.sampled_from(INSIDE[family]))
    patch = data.draw(st.sampled_from(PATCHES))
    assume(not (family == "opt" and name.endswith(IN_A_ROW) and patch is by_mixing))
    check(family, name, patch, data.draw(st.sampled_from(METHODS)))


@pytest.mark.parametrize("method", ["houlsby", "meft1-exact", "full+tiled_mlp"])
@pytest.mark.parametrize("kind", ["forward", "backward", "backward_pre"])
def test_hooks_on_an_attention_that_runs_without_its_projection(kind, method):
    def hook(*_):
        return None

    model = copy.deepcopy(MODELS["llama"])
    attention = model.get_submodule("model.layers.1.self_attn")
    register = {
        "forward": attention.register_forward_hook,
        "backward": attention.register_full_backward_hook,
        "backward_pre": attention.register_full_backward_pre_hook,
    }[kind]
    handle = register(hook)
    with pytest.raises(UserError, match=r"LlamaAttention: has hooks.*without its output projection.*hook its proj"):
        meftbench.apply_method(model, method)
    handle.remove()
    meftbench.apply_method(model, method)


@pytest.mark.parametrize("wrapped", [functools.wraps, lambda _: lambda function: function])
def test_a_class_that_was_patched(monkeypatch, wrapped):
    """As libraries of kernels do it: all models of the family run their forward."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    before = LlamaDecoderLayer.forward

    def counted(self, *args, **kwargs):
        return before(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", wrapped(before)(counted))
    for method in ("parallel", "meft1-exact", "full+tiled_mlp"):
        with pytest.raises(UserError, match=r"LlamaDecoderLayer.forward was replaced \(.*test_patched_layers"):
            meftbench.apply_method(copy.deepcopy(MODELS["llama"]), method)
    meftbench.apply_method(copy.deepcopy(MODELS["llama"]), "lora+checkpoint")


@pytest.mark.parametrize("method", ["meft1-exact", "meft3-exact"])
@pytest.mark.parametrize("place", ["", "attention", "output"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_that_will_not_be_called_are_said(kind, place, method):
    model = copy.deepcopy(MODELS["bert"])
    getattr(model.get_submodule("bert.encoder.layer.1").get_submodule(place), kind)(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks on 1 layers, the first of them layer 1, will not be called"):
        meftbench.apply_method(model, method)


def test_a_part_that_would_be_left_out():
    for place, name in (("", "feed_forward_chunk"), ("attention", "forward"), ("output", "forward")):
        model = copy.deepcopy(MODELS["bert"])
        module = model.get_submodule("bert.encoder.layer.1").get_submodule(place)
        setattr(module, name, getattr(module, name))
        with pytest.raises(UserError, match=f"its {name} was replaced on the instance"):
            meftbench.apply_method(model, "meft1-exact")


def test_looking_leaves_modes_and_random_numbers_as_they_were():
    model = copy.deepcopy(MODELS["llama"]).train()
    mlp = model.get_submodule("model.layers.1.mlp").eval()
    by_method(mlp)
    modes, numbers = [module.training for module in model.modules()], torch.random.get_rng_state()
    by_mixing(mlp)
    with pytest.raises(UserError, match="in which tokens see each other"):
        meftbench.apply_method(model, "full+tiled_mlp")

    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), numbers)
