"""Every method trains what it says, with the gradients of reference autograd."""

from __future__ import annotations

import copy

import pytest
import torch

import meftbench
from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.reversible import ReversibleStack
from tests.models import MEFTS, METHODS, a_batch, a_model, gradients, worst_relative_error

D, LAYERS, LABELS = 32, 4, 2
HEAD = D * LABELS + LABELS


def bottleneck(r):
    return 2 * D * r + r + D


# --- what is trained ---


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("lora", {"rank": 8}, LAYERS * 2 * 8 * 2 * D + HEAD),
        ("lora", {"rank": 4, "targets": ["query", "key", "value"]}, LAYERS * 3 * 4 * 2 * D + HEAD),
        ("houlsby", {"adapter_size": 8}, LAYERS * 2 * bottleneck(8) + HEAD),
        ("pfeiffer", {"adapter_size": 8}, LAYERS * bottleneck(8) + HEAD),
        ("parallel", {"adapter_size": 8}, LAYERS * bottleneck(8) + HEAD),
        ("meft1", {"adapter_size": 8}, LAYERS * 2 * bottleneck(8) + HEAD),
        ("meft2", {"adapter_size": 8}, LAYERS * 2 * bottleneck(8) + HEAD),
        ("meft3", {"adapter_size": 8}, LAYERS * 2 * bottleneck(8) + HEAD),
        ("meft1", {"adapter_size": 8, "output": "last"}, (LAYERS * 2 - 1) * bottleneck(8) + HEAD),
        ("meft1", {"adapter_size": 8, "reversible_layers": 3}, (3 * 2 + 1) * bottleneck(8) + HEAD),
        ("meft1", {"adapter_size": 8, "reversible_layers": 3, "remaining": "frozen"}, 3 * 2 * bottleneck(8) + HEAD),
    ],
)
def test_trainable_parameters_follow_the_closed_formula(method, settings, expected):
    """Adapters of 2·D·r + r + D, low-rank pairs of 2·D·r, and the task head; nothing else is trained."""
    applied = prepare(a_model(LAYERS), method, settings)

    assert expected == sum(p.numel() for p in applied.trained().values())


def test_full_trains_everything():
    """Full fine-tuning leaves no parameter frozen."""
    applied = prepare(a_model(), "full")

    assert all(parameter.requires_grad for parameter in applied.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_moves_what_is_trained_and_nothing_else(method):
    """After two real optimizer steps every trained tensor has changed and every frozen one is bit for bit the same."""
    applied = prepare(a_model(), method, seed=1)
    before = {name: p.detach().clone() for name, p in applied.model.named_parameters()}
    optimizer = torch.optim.AdamW(applied.trained().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        applied.model(**a_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = applied.trained()
    unmoved = {name for name, p in applied.model.named_parameters() if torch.equal(before[name], p)}
    # Token types and positions that the batch does not use aside, everything trained moves: whole tensors do.
    assert set(before) - set(trained) == unmoved


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel", "lora"])
def test_baselines_start_at_the_pre_trained_model(method):
    """With adapters at zero the logits are the pre-trained model's."""
    model = a_model(dropout=0.0)
    inputs = {key: value for key, value in a_batch().items() if key != "labels"}
    expected = model(**inputs).logits
    applied = prepare(model, method)
    applied.zero_adapters()

    assert torch.allclose(expected, applied.model(**inputs).logits, atol=1e-12)


# --- gradients (number 2 of the issue) ---

VARIANTS = [
    {},
    {"coupling": "centred"},
    {"output": "last"},
    {"coupling": "centred", "output": "last"},
    {"reversible_layers": 2},
    {"reversible_layers": 2, "reversible_at": "bottom"},
    {"reversible_layers": 3, "remaining": "frozen"},
]


@pytest.mark.parametrize("backbone", ["bert", "roberta"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", MEFTS)
def test_meft_gradients_are_those_of_reference_autograd(method, dropout, backbone):
    """fp64, 4 layers, padding: 1e-8 relative against reference autograd through the same equations."""
    applied = prepare(a_model(LAYERS, backbone=backbone, dropout=dropout), method, seed=1)

    loss, found = gradients(applied.model, a_batch())
    with applied.reference_autograd():
        assert "cache" == applied.stacks[0].activations
        expected_loss, expected = gradients(applied.model, a_batch())

    assert torch.equal(expected_loss, loss)
    assert worst_relative_error(found, expected) <= 1e-8


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("method", MEFTS)
def test_meft_gradients_with_every_setting(method, settings):
    """The couplings, the outputs, and any number of reversible layers at either end."""
    applied = prepare(a_model(LAYERS), method, settings, seed=1)

    _, found = gradients(applied.model, a_batch())
    with applied.reference_autograd():
        _, expected = gradients(applied.model, a_batch())

    assert worst_relative_error(found, expected) <= 1e-8


@pytest.mark.parametrize(
    "levers", ["checkpoint", "offload", "checkpoint+offload", "tiled_mlp", "checkpoint+offload+tiled_mlp"]
)
@pytest.mark.parametrize("method", METHODS)
def test_levers_change_no_gradient(method, levers):
    """Every lever equals the plain method's equations to 1e-12, dropout and padding on; tiles do not fit the tokens."""
    applied = prepare(a_model(), f"{method}+{levers}", seed=1)
    if "tiled_mlp" in applied.levers:
        applied.levers["tiled_mlp"].tiling.tiles = 5
    # Reversed, not cached, unless checkpointed.
    tolerance = 1e-8 if method in MEFTS and "checkpoint" not in levers else 1e-12

    with applied.around_forward():
        loss, found = gradients(applied.model, a_batch())
    with applied.reference_autograd():
        expected_loss, expected = gradients(applied.model, a_batch())

    assert torch.equal(expected_loss, loss)
    assert worst_relative_error(found, expected) <= tolerance


def test_the_equations_are_the_papers():
    """MEFT1 on two layers, written out by hand: h1 = λ·h1 + F(h2), h2 = h2 + G(h1), swapped, mean of the streams."""
    model = a_model(2, dropout=0.0)
    plain = copy.deepcopy(model)
    applied = prepare(model, "meft1", {"lambda": 0.1}, seed=1)
    blocks = applied.stacks[0].blocks
    ids = a_batch()["input_ids"]
    h1 = h2 = plain.bert.embeddings(ids)
    for block in blocks:
        h1 = 0.1 * h1 + block.layer(h2)
        h2 = h2 + block.adapter(h1)
        h1, h2 = h2, h1

    assert torch.allclose((h1 + h2) / 2, applied.model.bert(ids).last_hidden_state, atol=1e-12)


@pytest.mark.parametrize("method", MEFTS)
def test_a_small_factor_and_the_last_stream_give_the_pre_trained_model(method):
    """λ, β → 0, adapters at zero, `output: last`: the pre-trained hidden states to 1e-4."""
    model = a_model(dropout=0.0)
    ids = a_batch()["input_ids"]
    expected = model.bert(ids).last_hidden_state
    factors = {"meft1": {"lambda": 1e-6}, "meft2": {"beta": 1e-6}, "meft3": {"lambda": 1e-6, "beta": 1e-6}}
    applied = prepare(model, method, factors[method] | {"output": "last"})
    applied.zero_adapters()

    assert torch.allclose(expected, applied.model.bert(ids).last_hidden_state, atol=1e-4)


def test_bf16_autocast_trains_every_adapter():
    """Under bf16 autocast gradients agree with reference autograd's to bf16's own rounding (β=λ=1: no
    amplification)."""
    applied = prepare(a_model(dtype=torch.float32), "meft1", {"lambda": 1.0}, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = gradients(applied.model, a_batch())
    with applied.reference_autograd(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, expected = gradients(applied.model, a_batch())

    assert worst_relative_error(found, expected) <= 0.05


@pytest.mark.parametrize("method", MEFTS)
def test_a_whole_model_is_saved_and_loaded(method, tmp_path):
    """torch.save of the model, and a state_dict into a model that has the method applied, give the same logits."""
    model = prepare(a_model(), method, seed=1).model.eval()
    inputs = {key: value for key, value in a_batch().items() if key != "labels"}
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    fresh = prepare(a_model(), method, seed=2).model.eval()
    fresh.load_state_dict(model.state_dict())

    for other in (again, fresh):
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)


# --- the public door ---


def test_apply_method_in_a_training_script():
    """The lines of the README: apply, optimise the trained parameters, step."""
    torch.manual_seed(0)
    model = meftbench.apply_method(a_model(dtype=torch.float32, dropout=0.0), "meft1", adapter_size=8, lambda_=0.125)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**a_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]
    assert isinstance(model.bert.encoder.layer[0], ReversibleStack)


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("meft11", {}, "unknown method 'meft11'; did you mean 'meft1'"),
        ("lora+checkpont", {}, "unknown lever 'checkpont'; did you mean 'checkpoint'"),
        ("meft1", {"adapter_sise": 8}, "unknown key 'adapter_sise'; did you mean 'adapter_size'"),
        ("meft1", {"reversible_layers": 9}, "9 of 4 layers; write all, or a number from 1 to 4"),
        ("meft1", {"reversible_layers": 2, "reversible_at": "bottom", "remaining": "frozen"}, "save nothing"),
        ("lora+offload", {}, "save_on_cpu"),
    ],
)
def test_wrong_settings_are_one_line(method, settings, line):
    """From Python as from a suite: where, what, cure."""
    with pytest.raises(UserError, match=line):
        meftbench.apply_method(a_model(), method, **settings)


@pytest.mark.parametrize("levers", ["", "+checkpoint", "+tiled_mlp"])
def test_full_trains_what_is_not_frozen(levers):
    """What a user has frozen stays so; nothing left to train is one line."""
    model = a_model(2, torch.float32)
    model.bert.embeddings.requires_grad_(False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained == prepare(model, f"full{levers}").trained().keys()
    with pytest.raises(UserError, match="BertForSequenceClassification: all its parameters are frozen; train some"):
        prepare(a_model(2, torch.float32).requires_grad_(False), f"full{levers}")
