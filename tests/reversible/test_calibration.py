"""The range of fixed-point streams comes from the model, and is widened without losing the step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.plan.protocol import Protocol
from meftbench.reversible import StreamError
from meftbench.reversible.calibration import CalibratedRange, Largest
from tests.models import a_batch, a_batch_for, a_cell, a_model, gradients, worst_relative_error

EXACT = ["meft1-exact", "meft2-exact", "meft3-exact"]


def a_decoder(method="meft1-exact", massive=0.0, dtype=torch.float32, **params):
    """A small Llama whose first channel holds `massive` from the embedding on, as language models' do."""
    model = a_model(4, dtype, "llama", dropout=0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += massive
    return prepare(model, method, params, seed=1)


@given(
    values=st.lists(st.floats(1e-6, 1e30), min_size=3, max_size=12),
    centred=st.booleans(),
)
def test_what_was_met_is_held_with_room_to_spare(values, centred):
    """Every channel, whatever its size: at least two bits of room, and no more than the next power of two leaves."""
    held, limit = CalibratedRange(), 2.0 ** (30 if centred else 31)
    held.calibrate(torch.tensor([values], dtype=torch.float64), limit, first_layer=0)

    for value, bits in zip(values, held.steps.bits_D.tolist(), strict=True):
        assert value * 2.0**bits * 4 <= limit or bits == -100
        median = sorted(values)[(len(values) - 1) // 2]
        assert bits == 30 or max(value, median / 16) * 2.0**bits * 4 * 2 >= limit


@pytest.mark.parametrize("stream_bits", [32, 64])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("method", [*EXACT, "bdia", "midpoint", "leapfrog"])
def test_a_massive_channel_is_reversed_exactly(method, tiles, dtype, stream_bits):
    """Values of 20,000 in one channel, padding, fp32 and autocast: strict finds nothing, gradients are autograd's."""
    applied = a_decoder(method, 20_000.0, tiles=tiles, strict=True, stream_bits=stream_bits)
    batch = a_batch_for(applied.model)

    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss, found = gradients(applied.model, batch)
        with applied.reference_autograd():
            expected_loss, expected = gradients(applied.model, batch)

    assert torch.equal(expected_loss, loss)
    assert worst_relative_error(found, expected) <= (1e-4 if dtype is None else 0.05)
    bits_D = applied.stacks[0].range.steps.bits_D
    assert bits_D[0] < bits_D.median() - 5


@pytest.mark.parametrize("method", EXACT)
def test_streams_of_64_bits_lose_nothing_of_a_float32(method):
    """One channel of the first token is massive: the error of the other tokens' last hidden states against float64 is
    that of float32 itself, where 32 bits add several times as much."""
    published = method.removesuffix("-exact")
    same = {"coupling": "centred", "output": "last", "adapter_input": "normed"}
    factors = {"meft1": ("lambda",), "meft2": ("beta",), "meft3": ("lambda", "beta")}[published]
    same |= dict.fromkeys(factors, 1 / 16)
    batch = {"input_ids": torch.arange(3, 15)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}

    def hidden(method, dtype=torch.float32, **params):
        decoder = a_decoder(method, **params).model.eval().to(dtype).get_decoder()
        with torch.no_grad():
            decoder.embed_tokens.weight[3, 0] = 20_000.0
            return decoder(**batch).last_hidden_state[:, 1:].double()

    true = hidden(published, torch.float64, **same)
    of_floats, of_32, of_64 = (
        float((found - true).norm() / true.norm())
        for found in (hidden(published, **same), hidden(method), hidden(method, stream_bits=64))
    )

    assert of_64 <= 1.5 * of_floats
    assert of_32 >= 3 * of_floats


@pytest.mark.parametrize("layers", [2, 6])
def test_streams_of_64_bits_cost_eight_bytes_an_element(layers):
    """What is kept for backward grows by two streams, whatever the depth."""
    B, L, D = 4, 64, 64
    saved = [
        measure_cell(
            a_cell("meft1-exact", method_params={"stream_bits": stream_bits}, batch_size=B, sequence_length=L,
                   model_config_overrides={"num_hidden_layers": layers, "hidden_size": D, "num_attention_heads": 4}),
            Protocol(warmup=1, steps=1, passes=("memory",)),
        ).metrics["saved_bytes"].value
        for stream_bits in (32, 64)
    ]  # fmt: skip

    assert 8 * B * L * D == saved[1] - saved[0]


def test_streams_of_floats_have_no_64_bits():
    """One line that says so."""
    with pytest.raises(UserError, match="stream_bits: 64 needs arithmetic: exact"):
        prepare(a_model(2), "meft1", {"stream_bits": 64})


def test_streams_of_64_bits_have_room_for_thirty_times_what_was_met():
    """They have bits to spare: a step for which 32 bits are run again, and generation with a cache would end."""
    applied = a_decoder(stream_bits=64)
    batch = a_batch_for(applied.model)
    gradients(applied.model, batch)
    with torch.no_grad():
        applied.model.model.embed_tokens.weight.mul_(30)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(applied.model, batch)

    assert 0 == applied.stacks[0].range.widenings


@pytest.mark.parametrize(("scale", "stream_bits"), [(50.0, 32), (1e6, 32), (1e12, 32), (1e6, 64), (1e12, 64)])
def test_leaving_the_range_costs_a_forward_pass_and_nothing_else(scale, stream_bits):
    """A later batch that leaves the range: one warning, the same loss and gradients as with a range from the start."""
    applied, fresh = (a_decoder(stream_bits=stream_bits) for _ in range(2))
    batch = a_batch_for(applied.model)
    gradients(applied.model, batch)
    for model in (applied.model, fresh.model):
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 3] += scale
    weights = {name: p.clone() for name, p in applied.trained().items()}

    with pytest.warns(UserWarning, match="the range was widened"):
        _, found = gradients(applied.model, batch)
    _, expected = gradients(fresh.model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(applied.model, batch)

    assert applied.stacks[0].range.widenings >= 1
    assert all(torch.equal(weights[name], p) for name, p in applied.trained().items())
    assert worst_relative_error(found, expected) < 1e-3


def test_dropout_is_repeated_where_a_pass_is_run_again():
    """The random numbers of the pass that is kept are those that the first one drew."""
    losses = []
    for widened in (False, True):
        applied = prepare(a_model(4, torch.float64, dropout=0.3), "meft1-exact", seed=1)
        applied.model(**a_batch())
        if widened:
            held = applied.stacks[0].range
            held.set_extra_state(held.get_extra_state() + 12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, _ = gradients(applied.model, a_batch())
        losses.append(loss)
        after = torch.get_rng_state()
    assert applied.stacks[0].range.widenings == 1
    assert torch.isclose(losses[0], losses[1], rtol=1e-6)
    assert torch.equal(after, torch.get_rng_state())


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), lost=st.integers(1, 20))
def test_a_range_that_is_too_narrow_by_any_number_of_bits(seed, lost):
    """It is widened until all is held, and reversal is exact afterwards."""
    applied = a_decoder(strict=True)
    batch = a_batch_for(applied.model)
    gradients(applied.model, batch)
    held = applied.stacks[0].range
    held.set_extra_state(held.get_extra_state() + lost)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, found = gradients(applied.model, batch)
    with applied.reference_autograd():
        _, expected = gradients(applied.model, batch)

    assert worst_relative_error(found, expected) <= 1e-5
    assert (held.widenings > 0) or lost <= 3


def test_weights_that_are_not_finite():
    """One line that names the layer."""
    applied = a_decoder()
    with torch.no_grad():
        applied.stacks[0].blocks[2].layer.mlp.down_proj.weight.fill_(float("nan"))

    with pytest.raises(StreamError, match="layer 2: the range of its streams cannot be calibrated"):
        applied.model(**a_batch_for(applied.model))


def test_generation_begins_with_an_untouched_cache():
    """Calibrated by `generate` itself, or before: the same tokens; and what is cached is no part of the range."""
    tokens = []
    for calibrated in (False, True):
        model = a_decoder(massive=2_000.0).model.eval()
        ids = torch.arange(5, 15)[None]
        if calibrated:
            with torch.no_grad():
                model(ids)
        tokens.append(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))

    assert torch.equal(*tokens)


def test_the_range_is_state():
    """A copy and a state dict carry it: the same logits, bit for bit, after another first batch."""
    model = a_decoder(massive=300.0).model.eval()
    batch = a_batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
        other = a_decoder(massive=300.0).model.eval()
        other(input_ids=torch.arange(100, 110)[None])
        other.load_state_dict(model.state_dict())

        assert torch.equal(expected, other(**batch).logits)
        assert torch.equal(expected, copy.deepcopy(model)(**batch).logits)


def test_the_largest_value_of_a_channel_is_taken_over_both_streams():
    """And over all blocks: a row each."""
    largest = Largest()
    largest("forward", 0, [torch.tensor([[[1.0, -5.0]]]), torch.tensor([[[3.0, 2.0]]])])
    largest.add([torch.tensor([[[0.0, 0.5]]]), torch.tensor([[[-7.0, 0.0]]])])

    assert [[3.0, 5.0], [7.0, 0.5]] == largest.table().tolist()
