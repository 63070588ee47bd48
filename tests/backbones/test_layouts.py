"""Layouts split transformers' own layers, and adapters attach without touching the pre-trained weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig

from meftbench.backbones import Site, layouts_of
from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.methods.bottleneck import Bottleneck
from tests.models import a_model

BACKBONES = ["bert", "roberta"]


def an_adapter():
    return Bottleneck(32, 8, "gelu", init_std=0.1).double()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "sites", [(), (Site.BESIDE_FEED_FORWARD,), (Site.BESIDE_ATTENTION_OUTPUT, Site.BESIDE_FEED_FORWARD)]
)
def test_the_sublayers_of_a_layer_are_the_layer(backbone, sites):
    """feed_forward(attention(h)) equals transformers' own layer bit for bit, dropout on, with and without adapters."""
    model = a_model(1, backbone=backbone)
    layout = layouts_of(model)[0]
    layer = layout.list_of(model)[2][0]
    for site in sites:
        layout.attach(layer, site, an_adapter())
    h = torch.randn(2, 6, 32, dtype=torch.float64)
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    mask[0, ..., 4:] = -torch.inf

    torch.manual_seed(3)
    expected = layer(h, mask)
    torch.manual_seed(3)
    found = layout.feed_forward(layer, layout.attention(layer, h, mask))

    assert torch.equal(expected, found)


@pytest.mark.parametrize("site", Site)
def test_an_adapter_of_zeros_changes_nothing(site):
    """At every site but the one that runs the norm on its own output, zero adapters leave the model as it was."""
    model = a_model(2, dropout=0.0)
    ids = torch.randint(5, 120, (2, 9))
    expected = model(ids).logits
    layout = layouts_of(model)[0]
    for layer in layout.list_of(model)[2]:
        adapter = an_adapter()
        adapter.zero()
        layout.attach(layer, site, adapter)

    assert torch.equal(expected, model(ids).logits)


@pytest.mark.parametrize("site", Site)
def test_an_adapter_is_read_and_survives_a_copy(site):
    """The hook of a copied model finds the copy's adapter, and the keys of the pre-trained weights stay."""
    model = a_model(1, dropout=0.0)
    before = set(model.state_dict())
    layout = layouts_of(model)[0]
    layout.attach(layout.list_of(model)[2][0], site, an_adapter())
    ids = torch.randint(5, 120, (2, 9))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if ".adapter." in name:
                parameter.add_(1.0)

    assert before < set(model.state_dict())
    assert not torch.equal(model(ids).logits, copied(ids).logits)
    for name, parameter in copied.named_parameters():
        if ".adapter." in name:
            parameter.data.sub_(1.0)
    assert torch.allclose(model(ids).logits, copied(ids).logits, atol=1e-12)


def test_a_decoder_is_refused_with_a_cure():
    """A BERT configured as a decoder is refused in one line before anything is changed."""
    config = BertConfig(is_decoder=True, **{"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4})
    model = AutoModelForMaskedLM.from_config(config)

    with pytest.raises(UserError, match=r"decoder.*choose another model"):
        prepare(model, "meft1")


def test_a_method_is_not_applied_twice():
    """A second method on the same model is refused."""
    model = a_model(2)
    prepare(model, "parallel")

    with pytest.raises(UserError, match=r"has parallel applied already; take it off by meftbench.unload"):
        prepare(model, "meft1")
