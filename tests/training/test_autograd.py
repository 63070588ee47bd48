"""Autograd as people use it around a reversible decoder, or encoder and decoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meftbench.methods import prepare
from tests.models import a_batch, a_model, gradients, worst_relative_error

BACKBONES = ["llama", "bart"]


def a_prepared_model(backbone, dtype=torch.float64, dropout=0.1, **settings):
    head = "seq2seq_lm" if backbone == "bart" else "causal_lm"
    model = a_model(2, backbone=backbone, dropout=dropout, head=head, dtype=dtype)
    return prepare(model, "meft1-exact", settings, seed=1)


def a_text_batch():
    return a_batch() | {"labels": a_batch()["input_ids"]}


def found_by_backward(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_clipping_sees_the_gradients_of_reference_autograd(backbone):
    """clip_grad_norm_ finds their norm and leaves gradients of norm 0.01."""
    applied = a_prepared_model(backbone)
    _, expected = gradients(applied.model, a_text_batch())
    torch.manual_seed(7)
    applied.model(**a_text_batch()).loss.backward()
    norm = nn.utils.clip_grad_norm_(applied.model.parameters(), 0.01)
    left = torch.cat([g.flatten() for g in found_by_backward(applied.model).values()]).norm()

    assert torch.isclose(torch.cat([g.flatten() for g in expected.values()]).norm(), norm)
    assert left.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_second_backward_needs_a_retained_graph(backbone):
    """Without: torch's own error. With: twice the gradient, to the bit, in `backward` and in `autograd.grad`."""
    model = a_prepared_model(backbone).model
    loss = model(**a_text_batch()).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    asked = torch.autograd.grad(loss, trained, retain_graph=True)
    assert all(p.grad is None for p in trained)
    loss.backward(retain_graph=True)
    loss.backward()

    for parameter, gradient in zip(trained, asked, strict=True):
        assert torch.equal(2 * gradient, parameter.grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_anomaly_mode(backbone):
    """detect_anomaly finds nothing and changes nothing."""
    model = a_prepared_model(backbone).model
    _, expected = gradients(model, a_text_batch())
    with torch.autograd.detect_anomaly():
        _, found = gradients(model, a_text_batch())

    assert all(torch.equal(expected[name], g) for name, g in found.items())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_trained_may_be_switched(backbone):
    """Adapters of the lowest block frozen, norms of the backbone trained: gradients of what is asked for, no other."""
    applied = a_prepared_model(backbone)
    model = applied.model
    for stack in applied.stacks:
        for name, parameter in stack.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)
            elif name.startswith("blocks.0."):
                parameter.requires_grad_(False)
    _, found = gradients(model, a_text_batch())
    with applied.reference_autograd():
        _, expected = gradients(model, a_text_batch())
    torch.manual_seed(7)
    model(**a_text_batch()).loss.backward()

    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found_by_backward(model))
    assert worst_relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("backbone", BACKBONES)
def test_nothing_may_be_trained(backbone):
    """All frozen, gradients enabled: a forward pass without a graph, as in evaluation; trained again afterwards."""
    model = a_prepared_model(backbone, dropout=0.0).model
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = model(**a_text_batch()).loss
    for parameter in trained:
        parameter.requires_grad_(False)
    frozen = model(**a_text_batch()).loss
    for parameter in trained:
        parameter.requires_grad_(True)

    assert not frozen.requires_grad
    assert torch.allclose(expected, frozen)
    model(**a_text_batch()).loss.backward()
    assert all(p.grad is not None for p in trained)


def test_groups_of_parameters_have_their_own_rates():
    """Adapters at one rate, norms at none, as optimizers are often given them."""
    applied = a_prepared_model("llama")
    norms = [p for name, p in applied.model.named_parameters() if "norm" in name]
    for norm in norms:
        norm.requires_grad_(True)
    adapters = [p for name, p in applied.trained().items() if "norm" not in name]
    before = [[p.detach().clone() for p in group] for group in (norms, adapters)]
    groups = [{"params": norms, "lr": 0.0}, {"params": adapters, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    applied.model(**a_text_batch()).loss.backward()
    optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(before[0], norms, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[1], adapters, strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_scaled_losses_of_fp16_autocast(backbone):
    """GradScaler: unscaled gradients agree with float32 to fp16's rounding; a step that overflows is left out."""
    applied = a_prepared_model(backbone, torch.float32, 0.0, strict=True)
    model = applied.model
    _, expected = gradients(model, a_text_batch())
    optimizer = torch.optim.SGD(applied.trained().values(), lr=0.1)
    before = {name: p.detach().clone() for name, p in applied.trained().items()}
    for scale, moves in ((2.0**30, False), (2.0**10, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**a_text_batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found = found_by_backward(model)
        scaler.step(optimizer)
        scaler.update()

        assert moves == any(not torch.equal(before[name], p) for name, p in applied.trained().items())
        assert moves == (scaler.get_scale() == scale)
    assert worst_relative_error(found, {name: expected[name] for name in found}) <= 0.1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_evaluation_between_forward_and_backward(backbone):
    """A second forward pass under no_grad, in another mode, before backward takes nothing from the first."""
    model = a_prepared_model(backbone).model
    _, expected = gradients(model, a_text_batch())
    torch.manual_seed(7)
    loss = model(**a_text_batch()).loss
    with torch.no_grad():
        model.eval()(**a_text_batch())
    loss.backward()

    assert all(torch.equal(expected[name], g) for name, g in found_by_backward(model).items())
