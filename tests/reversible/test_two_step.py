"""BDIA, midpoint and leapfrog: the published rules, where γ is from, what is kept, and both modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import meftbench
from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.plan.protocol import Protocol
from meftbench.reversible import Block, Coupling, FixedPoint, ReversibleStack, fused
from tests.models import TWO_STEP, a_batch, a_batch_for, a_cell, a_model, gradients, worst_relative_error

B, L, D = 4, 64, 64


def by_hand(method, layers, h, signs):
    """The published rule in float64: states h0, h1 = layer(h0), then each from the two before it."""
    states = [h, layers[0](h)]
    for layer, sign in zip(layers[1:], signs[1:], strict=True):
        before, last = states[-2:]
        added = layer(last) - last
        gamma = sign[:, None, None] / 2
        states.append(
            {
                "bdia": gamma * before + (1 - gamma) * last + (1 + gamma) * added,
                "midpoint": before + 2 * added,
                "leapfrog": 2 * last - before + added,
            }[method]
        )
    return states[-1]


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("backbone", ["bert", "vit"])
@pytest.mark.parametrize("method", TWO_STEP)
def test_the_equations_are_the_papers(method, backbone, tiles):
    """Post-norm and pre-norm layers, four of them, written out by hand; γ is each sample's own, whatever the tiles."""
    model = a_model(4, backbone=backbone, dropout=0.0)
    applied = prepare(model, method, {"stream_bits": 64, "tiles": tiles}, seed=1)
    (stack,) = applied.stacks
    h = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.manual_seed(3)
    signs = torch.randint(0, 2, (4, 1, 3), dtype=torch.int8)[:, 0] * 2 - 1
    torch.manual_seed(3)

    found = stack(h)

    layers = [block.layer for block in stack.blocks]
    with torch.no_grad():
        assert torch.allclose(by_hand(method, layers, h, signs), found, atol=1e-9)
    assert signs.unique().tolist() == [-1, 1]


def test_in_evaluation_bdia_is_the_pre_trained_model():
    """γ is 0: with adapters at zero the logits are the model's own to the rounding of the streams; in training, and by
    the rules without such a mode, they are not."""
    for backbone, head in (("bert", None), ("llama", "causal_lm"), ("bart", "seq2seq_lm")):
        plain = a_model(backbone=backbone, head=head, dropout=0.0).eval()
        batch = a_batch_for(plain)
        expected = plain(**batch).logits
        logits = {}
        for method in TWO_STEP:
            applied = prepare(copy.deepcopy(plain), method, {"stream_bits": 64}, seed=1)
            applied.zero_adapters()
            with torch.no_grad():
                logits[method] = applied.model.eval()(**batch).logits
                if method == "bdia":
                    logits["training"] = applied.model.train()(**batch).logits

        assert torch.allclose(expected, logits.pop("bdia"), atol=1e-9)
        assert not any(torch.allclose(expected, others, atol=1e-4) for others in logits.values())


def test_gamma_comes_from_the_seed_and_the_global_stream_is_left_alone():
    """The same seed gives the same step, another seed another; what is drawn after it is as without reversal."""
    applied = prepare(a_model(), "bdia", {"tiles": 2}, seed=1)
    (first, _), (again, _), (other, _) = (gradients(applied.model, a_batch(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    gradients(applied.model, a_batch(), 1)
    drawn = torch.rand(3)
    with applied.reference_autograd():
        gradients(applied.model, a_batch(), 1)
    assert torch.equal(drawn, torch.rand(3))


def test_gradients_in_evaluation_are_those_of_ordinary_autograd():
    """γ = 0 has no inverse; a backward pass in evaluation mode is run by checkpointing, as nothing can be reversed."""
    plain = a_model(dropout=0.0)
    applied = prepare(copy.deepcopy(plain), "bdia", {"stream_bits": 64}, seed=1)
    parallel = prepare(plain, "parallel", seed=1)
    names = [name.replace("layer.0.blocks", "layer").replace(".layer.output", ".output") for name in applied.trained()]
    assert names == list(parallel.trained())
    with torch.no_grad():
        for ours, theirs in zip(applied.trained().values(), parallel.trained().values(), strict=True):
            ours.copy_(theirs)

    _, found = gradients(applied.model.eval(), a_batch())
    _, expected = gradients(parallel.model.eval(), a_batch())

    assert worst_relative_error(dict(zip(expected, found.values(), strict=True)), expected) <= 1e-8


@pytest.mark.parametrize(
    ("method", "settings", "bits"),
    [("bdia", {}, 1), ("bdia", {"side_bits": 4}, 4), ("midpoint", {}, 0), ("leapfrog", {}, 0)],
)
def test_side_bits_are_an_eighth_of_a_byte_an_element_and_layer(method, settings, bits):
    """What is kept for backward grows by the side bits of four layers more, and by their signs, and by nothing else."""
    kept = [
        measure_cell(
            a_cell(
                method,
                method_params=settings,
                batch_size=B,
                sequence_length=L,
                model_config_overrides={
                    "num_hidden_layers": layers,
                    "hidden_size": D,
                    "num_attention_heads": 4,
                    "attention_probs_dropout_prob": 0.0,
                    "hidden_dropout_prob": 0.0,
                },
            ),
            Protocol(warmup=1, steps=1, passes=("memory",)),
        )
        .metrics["saved_bytes"]
        .value
        for layers in (2, 6)
    ]

    assert 4 * B * L * D * bits // 8 == kept[1] - kept[0]


def test_a_step_that_is_run_again_in_a_wider_range_draws_the_same_gamma():
    """Calibrated on small values, a later batch leaves the range: loss and gradients are those of reference autograd at
    the wider range, and strict mode finds nothing."""
    model = a_model(backbone="llama", head="causal_lm", dtype=torch.float32)
    applied = prepare(model, "bdia", {"strict": True, "tiles": 2}, seed=1)
    batch = a_batch_for(model)
    gradients(model, batch)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2000)

    with pytest.warns(UserWarning, match="left the range"):
        loss, found = gradients(model, batch)
    with applied.reference_autograd():
        expected_loss, expected = gradients(model, batch)

    assert applied.stacks[0].range.widenings > 0
    assert torch.equal(expected_loss, loss)
    assert worst_relative_error(found, expected) <= 1e-4


def test_the_fused_kernels_are_not_taken(monkeypatch):
    """They know neither signs nor the weight of a value, also where a prediction assumes them for every tile."""
    monkeypatch.setattr(fused, "usable", lambda *_: True)
    monkeypatch.setattr(fused, "forward_", None)
    x, o, value = torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 8)
    for coupling in (
        Coupling(FixedPoint(), 1 / 2, 2, drawn=True),
        Coupling(FixedPoint(), 1.0, 2),
        Coupling(FixedPoint(), -1.0, 1),
        Coupling(FixedPoint(), 1 / 2, 2, drawn=True).in_mode(training=False),
    ):
        coupling.forward_(x.clone(), o, value, torch.ones(2, 1, dtype=torch.int8) if coupling.drawn else None)
    with pytest.raises(TypeError):
        Coupling(FixedPoint(), 1 / 2, 1).forward_(x.clone(), o, value)


def test_what_does_not_apply_is_one_line():
    """Settings of MEFT that these rules lack, and side bits where there are none."""
    for method, settings, said in (
        ("bdia", {"lambda": 0.5}, "unknown key 'lambda'"),
        ("midpoint", {"side_bits": 1}, "unknown key 'side_bits'"),
        ("leapfrog", {"arithmetic": "float"}, "arithmetic: .*exact"),
        ("bdia", {"side_bits": 9}, "side_bits: .*less than or equal to 8"),
    ):
        with pytest.raises(UserError, match=said):
            meftbench.apply_method(a_model(2), method, **settings)


def test_a_stack_has_a_coupling_for_each_sublayer():
    """A block of one sublayer takes one coupling."""
    block = Block({"linear": nn.Linear(4, 4)}, lambda block, h: block.linear(h))
    one = Coupling(FixedPoint(), 1.0, 2)

    assert ReversibleStack([block], one, swap=True, carrier=0, output="last")(torch.ones(1, 2, 4)).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="as many couplings as each of its blocks has sublayers"):
        ReversibleStack([block], one, one, swap=True, carrier=0)
