"""Every backbone: its layers split into sublayers, MEFT's gradients are right, its reversal exact, its start
untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from long_profile import sampled
from meftbench.backbones import Site, layouts_of
from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.models import MODELS
from meftbench.methods import prepare
from meftbench.methods.bottleneck import Bottleneck
from meftbench.probes.fidelity import StreamErrors
from tests.models import EXACTS, MEFTS, TINY, TWO_STEP, a_batch_for, a_model, gradients, worst_relative_error

FAMILIES = list(TINY)


EXACT = [*EXACTS, *TWO_STEP]


def in_turn(methods, first):
    """One method a family, from the one numbered `first` on.

    Each family meets each method once in the three tests that take them in turn; with every method it stands in
    `test_gradients_of_exact_reversal_are_those_of_reference_autograd`, which sees whatever these see of a family's
    sublayers under a method: the same equations, the same passes and the same pieces, to 1e-12.
    """
    return [(family, methods[(first + number) % len(methods)]) for number, family in enumerate(FAMILIES)]


def calls_of(model):
    """For each layout: the layers, and what each was called with and gave, in one forward pass with dropout."""
    found = []
    handles = []
    for layout in layouts_of(model):
        calls = []
        for layer in layout.list_of(model)[2]:

            def before(module, args, kwargs, calls=calls):
                kwargs = dict(kwargs)
                h = args[0] if args else kwargs.pop("hidden_states")
                calls.append([module, torch.get_rng_state(), h, args[1:], kwargs])

            def after(module, args, kwargs, output, calls=calls):
                calls[-1].append(output)

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True))
        found.append((layout, calls))
    torch.manual_seed(5)
    model.config.use_cache = False
    model(**a_batch_for(model))
    for handle in handles:
        handle.remove()
    return found


def attach(model, sites, zero=False):
    for layout in layouts_of(model):
        for layer in layout.list_of(model)[2]:
            for site in sites:
                adapter = Bottleneck(32, 8, "gelu", init_std=0.1).double()
                if zero:
                    adapter.zero()
                layout.attach(layer, site, adapter)


@pytest.mark.parametrize("sites", [(), (Site.BESIDE_ATTENTION_OUTPUT, Site.BESIDE_FEED_FORWARD)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sublayers_are_transformers_own_layer(family, sites):
    """On what the model itself passes its layers, feed_forward(attention(h)) is the layer's output bit for bit (BART:
    to rounding), with dropout, padding, and masks of the layer's own; with adapters it is what the layer with adapters
    gives."""
    model = a_model(2, backbone=family)
    for vector in (parameter for parameter in model.parameters() if parameter.dim() == 1):
        nn.init.uniform_(vector, 0.5, 1.5)  # norms that are all ones are one like the other
    attach(model, sites)

    for layout, calls in calls_of(model):
        assert 2 == len(calls)
        for layer, state, h, args, kwargs, expected in calls:
            torch.set_rng_state(state)
            found = layout.feed_forward(layer, layout.attention(layer, h, *args, **kwargs))
            # With biases, the two attentions of BART's decoder layer add in another order.
            same = torch.allclose(expected, found, rtol=0, atol=1e-13) if family == "bart" else expected.equal(found)
            assert same


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_heads_are_all_heads(family):
    """The core's output for groups of heads, side by side, is that for all of them (no dropout: masks would differ)."""
    model = a_model(2, backbone=family, dropout=0.0)

    for layout, calls in calls_of(model):
        groups = layout.head_groups(model.config)
        for layer, _, h, args, kwargs, _ in calls:
            x = h if layout.attention_before is None else layout.attention_before(layer, h)
            whole = layout.attention_core(layer, x, 0, 1, *args, **kwargs)
            parts = [layout.attention_core(layer, x, part, groups, *args, **kwargs) for part in range(groups)]
            assert torch.allclose(whole, torch.cat(parts, -1), atol=1e-12)
        assert groups == (1 if "decoder" in layout.layers and family == "bart" else max(groups, 2))


@pytest.mark.parametrize("site", Site)
@pytest.mark.parametrize("family", ["bart", "opt", "opt-post", "vit", "llama", "gemma3", "qwen3_5"])
def test_an_adapter_is_read_and_one_of_zeros_changes_nothing(family, site):
    """At every site; the keys of the pre-trained weights stay, and a copy reads its own adapters.

    Between the norms of a post-norm layer, zeros change nothing either: the norm reads h + 0.
    """
    model = a_model(2, backbone=family, dropout=0.0)
    batch, keys = a_batch_for(model), set(model.state_dict())
    expected = model(**batch).logits
    attach(model, [site], zero=True)
    assert torch.equal(expected, model(**batch).logits)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "meft_adapters" in name:
                parameter.add_(torch.randn_like(parameter))

    assert keys < set(model.state_dict())
    assert torch.equal(expected, model(**batch).logits)
    assert not torch.allclose(expected, copied(**batch).logits, atol=1e-6)


@pytest.mark.parametrize(("family", "method"), in_turn(MEFTS, 0))
def test_gradients_are_those_of_reference_autograd(family, method):
    """Four layers in float64, dropout and padding on, three tiles: relative L2 error of every tensor at most 1e-8.

    With the published factor 0.1 where it allows that. In pre-norm layers it does not: norms magnify the small streams
    and what division by 0.1 has lost of them (MEFT3 on DeiT: 7e-5), and RMS norms round to float32 inside.
    """
    post_norm = family in ("bert", "roberta", "bart")
    factors = (
        {}
        if post_norm
        else {"meft1": {"lambda": 0.5}, "meft2": {"beta": 0.5}}.get(method, {"lambda": 0.5, "beta": 0.5})
    )
    applied = prepare(a_model(4, backbone=family), method, {"tiles": 3} | factors, seed=1)
    model, batch = applied.model, a_batch_for(applied.model)

    loss, found = gradients(model, batch)
    with applied.reference_autograd():
        expected_loss, expected = gradients(model, batch)

    assert torch.allclose(loss, expected_loss, rtol=1e-12)
    assert worst_relative_error(found, expected) <= 1e-8


@pytest.mark.parametrize(
    ("family", "method"), sampled([(family, method) for family in FAMILIES for method in EXACT], 3)
)
def test_gradients_of_exact_reversal_are_those_of_reference_autograd(family, method):
    """The same with fixed-point streams, all groups of heads: 1e-12, since nothing is lost."""
    groups = {"tiles": 3, "head_groups": 1 if family == "bart" else 2}
    applied = prepare(a_model(4, backbone=family), method, groups, seed=1)
    model, batch = applied.model, a_batch_for(applied.model)

    loss, found = gradients(model, batch)
    with applied.reference_autograd():
        expected_loss, expected = gradients(model, batch)

    assert torch.equal(loss, expected_loss)
    assert worst_relative_error(found, expected) <= 1e-12


def mismatched(applied, batch):
    """Elements of all streams of all stacks that the backward pass did not restore bit for bit."""
    observers = []
    for stack in applied.stacks:
        stack.observer = StreamErrors(stack)
        observers.append(stack.observer)
    gradients(applied.model, batch)
    assert all(len(stack.blocks) == len(o.relative) for stack, o in zip(applied.stacks, observers, strict=True))
    return sum(observer.mismatched for observer in observers)


@pytest.mark.parametrize(("family", "method"), [*in_turn(EXACTS, 1), *in_turn(TWO_STEP, 0)])
def test_reversal_is_exact_at_twelve_layers(family, method):
    """fp32, dropout and padding on, three tiles and all groups of heads: no element differs."""
    model = a_model(12, torch.float32, backbone=family)
    groups = {"tiles": 3, "head_groups": 1 if family == "bart" else 2}

    assert 0 == mismatched(prepare(model, method, groups, seed=1), a_batch_for(model))


@pytest.mark.parametrize("family", ["bart", "opt", "vit", "llama", "gemma3"])
def test_reversal_is_exact_under_autocast_and_in_bf16(family):
    """bf16 autocast and a bf16 model: no element differs."""
    for dtype in (torch.float32, torch.bfloat16):
        model = a_model(3, dtype, backbone=family)
        batch = a_batch_for(model)
        applied = prepare(model, "meft3-exact", {"tiles": 2}, seed=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            assert 0 == mismatched(applied, batch)


@pytest.mark.parametrize(("family", "method"), in_turn(MEFTS, 2))
def test_with_lambda_near_zero_the_forward_is_the_pre_trained_one(family, method):
    """λ (MEFT2: β, MEFT3: both) 1e-6, zero adapters, the last stream, float64: logits within 1e-4 of the model's own;
    the mean of the streams is elsewhere."""
    model = a_model(4, backbone=family).eval()
    batch = a_batch_for(model)
    expected = model(**batch).logits
    small = {"meft1": {"lambda": 1e-6}, "meft2": {"beta": 1e-6}, "meft3": {"lambda": 1e-6, "beta": 1e-6}}[method]
    mean = prepare(copy.deepcopy(model), method, small | {"output": "mean"}, seed=1)
    last = prepare(model, method, small | {"output": "last"}, seed=1)
    for applied in (mean, last):
        applied.zero_adapters()

    assert torch.allclose(expected, last.model(**batch).logits, atol=1e-4)
    if "classification" not in type(model).__name__.lower():
        assert not torch.allclose(expected, mean.model(**batch).logits, atol=1e-4)


def bottlenecks(width=32, size=64):
    return 2 * width * size + size + width


def head_size(model):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classif" in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_parameters_are_closed_formulas(family):
    """Adapters: 2·D·r + r + D each; LoRA: r·(in + out) for queries and values; and a new head, where it is new."""
    layers = 8 if family == "bart" else 4  # of two stacks
    adapters = {"houlsby": 2, "pfeiffer": 1, "parallel": 1, "meft1": 2, "meft2": 2, "meft3": 2, "bdia": 1}
    for method, each in adapters.items():
        trained = prepare(a_model(4, backbone=family), method, seed=1).trained()
        new = sum(p.numel() for n, p in trained.items() if "classif" in n)
        assert layers * each * bottlenecks() + new == sum(p.numel() for p in trained.values())
        assert (new > 0) == ("classification" in type(a_model(1, backbone=family)).__name__.lower())

    lora = prepare(a_model(4, backbone=family), "lora", {"rank": 4}, seed=1).trained()
    expected = 4 * sum(32 + outputs for outputs in widths_of_lora_targets(family))
    assert expected == sum(p.numel() for n, p in lora.items() if "lora_" in n)


def widths_of_lora_targets(family):
    """The outputs of each projection that LoRA adapts by default, over all layers of a model of four."""
    if family == "bart":  # four encoder layers with one attention, four decoder layers with two
        return 12 * [32, 32]
    if family in ("bert", "roberta", "opt", "opt-post", "vit", "deit"):
        return 4 * [32, 32]
    if not family.startswith(("qwen3_5", "qwen3_next")):
        return 4 * [32, 16]
    # Queries with their gate, and values, of two heads of keys; and a projection for both, in a gated delta net with
    # queries and keys of 2 · 4, values of 4 · 8, and, in Qwen3-Next, their gate.
    of_delta_net = 8 + 8 + 32 + (32 if family == "qwen3_next" else 0)
    return 2 * [64, 16, of_delta_net]


def test_a_wrong_layout_would_be_seen():
    """The comparison above is one: a layout with the norms exchanged fails it."""
    from dataclasses import replace

    from meftbench.backbones.vit import _NAMES

    wrong = replace(_NAMES, attention_norm="layernorm_after", feed_forward_norm="layernorm_before").layout("layers")
    model = a_model(2, backbone="vit", dropout=0.0)
    for norm in [m for m in model.modules() if isinstance(m, nn.LayerNorm)]:
        nn.init.normal_(norm.weight)
    ((_, calls),) = calls_of(model)

    layer, _, h, args, kwargs, expected = calls[0]
    found = wrong.feed_forward(layer, wrong.attention(layer, h, *args, **kwargs))
    assert not torch.allclose(expected, found, atol=1e-3)


def test_every_family_is_there():
    """The table of small models covers the catalogue."""
    assert {MODELS[name].model_type for name, *_ in TINY.values()} == set(BACKBONES)
