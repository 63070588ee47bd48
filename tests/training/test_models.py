"""What people do with a model beside training it: heads, inputs, precisions, copies, files, modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meftbench.backbones.build import build_model
from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.reversible import Relay
from tests.models import TINY, a_batch, a_model, gradients, worst_relative_error

DECODERS = ["llama", "gemma3", "opt"]
# gemma3 has relays, whose stack is no submodule of theirs; bart has two stacks.
FAMILIES = ["gemma3", "bart"]


def a_prepared_model(backbone, method="meft1-exact", dropout=0.0, head=None, dtype=torch.float64, **settings):
    head = head or ("seq2seq_lm" if backbone == "bart" else "causal_lm")
    model = a_model(2, backbone=backbone, dropout=dropout, head=head, dtype=dtype)
    return prepare(model, method, settings, seed=1)


def inputs():
    return {key: value for key, value in a_batch().items() if key != "labels"}


def a_text_batch():
    return inputs() | {"labels": a_batch()["input_ids"]}


# --- heads and what they are called with ---


@pytest.mark.parametrize("labels", [1, 5])
@pytest.mark.parametrize("backbone", [*DECODERS, "bart"])
def test_any_number_of_labels(backbone, labels):
    """Regression and five classes: gradients of reference autograd, the head's too."""
    name, overrides, rates = TINY[backbone]
    overrides = overrides | dict.fromkeys(rates, 0.0)
    overrides |= {"encoder_layers": 2, "decoder_layers": 2} if backbone == "bart" else {"num_hidden_layers": 2}
    model = build_model(f"{name}@random", overrides, num_labels=labels, head="classification", dtype=torch.float64)
    applied = prepare(model, "meft1-exact", seed=1)
    batch = a_batch() | {"labels": torch.rand(3, dtype=torch.float64) if labels == 1 else torch.tensor([0, 4, 2])}
    if backbone == "bart":
        batch["input_ids"][:, 6] = model.config.eos_token_id  # its head reads there
    loss, found = gradients(model, batch)
    with applied.reference_autograd():
        expected_loss, expected = gradients(model, batch)

    assert (3, labels) == model(**batch).logits.shape
    assert torch.allclose(expected_loss, loss)
    assert worst_relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("backbone", ["bert", "bart", *DECODERS])
def test_what_layers_give_is_refused_in_a_line(backbone, option):
    """In the call of a model with a head, and in the configuration."""
    name, overrides, _ = TINY[backbone]
    model = build_model(f"{name}@random", overrides, head="classification", attention="eager")
    prepare(model, "meft1-exact", {"head_groups": 1}, seed=1)
    line = f"^{option}: a reversible model does not keep what its layers give; take last_hidden_state"
    with pytest.raises(UserError, match=line):
        model(**a_batch(), **{option: True})
    setattr(model.config, option, True)
    with pytest.raises(UserError, match=line):
        model(**a_batch())


@pytest.mark.parametrize("backbone", [*DECODERS, "bart"])
def test_tuples_and_embeddings(backbone):
    """`return_dict=False`, and embeddings in place of tokens: the same logits, and a gradient for the embeddings."""
    applied = a_prepared_model(backbone)
    model, batch = applied.model, a_text_batch()
    expected = model(**batch)
    loss, logits = model(**batch, return_dict=False)[:2]
    given = {key: value for key, value in batch.items() if key != "input_ids"}
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    found = model(inputs_embeds=embedded, **given)
    (reversed_,) = torch.autograd.grad(found.loss, [embedded])
    with applied.reference_autograd():
        (plain,) = torch.autograd.grad(model(inputs_embeds=embedded, **given).loss, [embedded])

    assert torch.equal(expected.loss, loss)
    assert torch.equal(expected.logits, logits)
    assert torch.allclose(expected.logits, found.logits, atol=1e-4)
    assert (reversed_ - plain).norm() <= 1e-4 * plain.norm()


# --- modes, precisions ---


@pytest.mark.parametrize("backbone", [*DECODERS, "bart"])
def test_evaluation_draws_nothing(backbone):
    """eval(): twice the same, and other than in training with dropout; train() switches back."""
    model = a_prepared_model(backbone, dropout=0.5).model
    with torch.no_grad():
        first, second = (model.eval()(**inputs()).logits for _ in range(2))
        trained, again = (model.train()(**inputs()).logits for _ in range(2))

    assert torch.equal(first, second)
    assert not torch.equal(trained, again)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64)])
@pytest.mark.parametrize("backbone", ["llama", "bart"])
def test_a_model_may_be_cast_after_the_method_is_applied(backbone, cast):
    """Adapters and streams follow; exact reversal is exact in each precision."""
    model = cast(a_prepared_model(backbone, dtype=torch.float32, strict=True, tiles=3).model)
    output = model(**a_text_batch())
    output.loss.backward()
    like = next(model.parameters()).dtype

    assert like == output.logits.dtype
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad.dtype == like and parameter.grad.isfinite().all()), name


# --- copies and files ---


@pytest.mark.parametrize("backbone", FAMILIES)
def test_copies_train_their_own_weights(backbone):
    """A deep copy gives the same gradients; training it leaves the original as it was."""
    model = a_prepared_model(backbone).model
    _, expected = gradients(model, a_text_batch())  # the first forward pass calibrates the range, which is state
    before = {name: p.clone() for name, p in model.state_dict().items()}
    other = copy.deepcopy(model)
    _, found = gradients(other, a_text_batch())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()

    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model, a_text_batch())[1].items())
    relays = [module for module in other.modules() if isinstance(module, Relay)]
    assert {id(relay._stack[0]) for relay in relays} <= {id(module) for module in other.modules()}


@pytest.mark.parametrize("backbone", FAMILIES)
def test_an_average_of_weights_is_a_model(backbone):
    """AveragedModel with exponential decay: its weights are the average's, and it predicts with them."""
    model = a_prepared_model(backbone).model
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    seen = []
    for _ in range(2):
        model(**a_text_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    fresh = a_prepared_model(backbone).model
    fresh.load_state_dict(averaged.module.state_dict(), strict=True)

    for name, p in averaged.module.named_parameters():
        assert torch.allclose((seen[0][name] + seen[1][name]) / 2, p, atol=1e-12), name
    assert torch.equal(fresh.eval()(**inputs()).logits, averaged.eval()(**inputs()).logits)
    assert not torch.equal(fresh(**inputs()).logits, model.eval()(**inputs()).logits)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_whole_models_and_states_are_files(backbone, tmp_path):
    """torch.save of the model and of its state_dict: the same logits, and the loaded model trains."""
    model = a_prepared_model(backbone).model
    expected = model(**inputs()).logits
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    fresh = prepare(
        a_model(2, backbone=backbone, dropout=0.0, head="seq2seq_lm" if backbone == "bart" else "causal_lm"),
        "meft1-exact",
        seed=2,
    ).model
    assert not torch.equal(expected, fresh(**inputs()).logits)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    _, trained = gradients(model, a_text_batch())

    for other in (loaded, fresh):
        assert torch.equal(expected, other(**inputs()).logits)
        assert all(torch.equal(g, trained[name]) for name, g in gradients(other, a_text_batch())[1].items())
