"""`+chunked_loss`: transformers' own loss and gradients, and never the whole logits."""

from __future__ import annotations

import pickle
from copy import deepcopy
from functools import wraps
from types import MethodType

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import build_step
from meftbench.methods import prepare
from meftbench.methods.levers.chunked_loss import CHUNKS, FEWEST, InChunks, chunk_rows
from meftbench.methods.levers.vocabulary_loss import Head, VocabularyLoss
from meftbench.plan.cell import Cell
from meftbench.prediction.trace import count_uncomputed
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.levers import check_levers
from tests.models import TINY, a_batch_for, a_model, gradients

PREDICTING = ["opt", "opt-post", "llama", "qwen3", "gemma2", "gemma3", "bart"]
SMALL_OPT = {**TINY["opt"][1], "num_hidden_layers": 2, "dropout": 0.0, "attention_dropout": 0.0}
WITHOUT_TORCHS_OWN = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has no fused function of its own"
)


def a_predictor(backbone="opt", dtype=torch.float64):
    return a_model(2, dtype, backbone, head="seq2seq_lm" if backbone == "bart" else "causal_lm")


def a_cell(method, **changes):
    values = {"model": "opt-125m@random", "model_config_overrides": SMALL_OPT, "batch_size": 4, "sequence_length": 16}
    return Cell.of(method, **(values | changes))


def a_head(dtype, *, trained=False, hidden=32):
    module = torch.nn.Linear(hidden, 120, bias=False, dtype=dtype).requires_grad_(trained)
    return Head(module, bias=None, cap=None, in_float32=True)


def assert_same(found, expected, rel=1e-12):
    """Losses to float32's rounding, which is transformers' dtype of a loss; gradients far closer, because the float32
    part of both is computed token by token, the same way. Against the largest: a key's bias has a gradient of zero."""
    (loss, gradient), (loss_expected, gradient_expected) = found, expected
    assert float(loss_expected) == pytest.approx(float(loss), rel=1e-6)
    assert list(gradient_expected) == list(gradient)
    largest = max(float(g.norm()) for g in gradient_expected.values())
    for name, g in gradient_expected.items():
        assert float((gradient[name] - g).norm()) <= rel * max(float(g.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact", "lora+checkpoint"])
@pytest.mark.parametrize("backbone", PREDICTING)
def test_loss_and_gradients_are_those_of_transformers(backbone, method):
    """Whatever comes between hidden states and loss: a projection, a soft cap, a bias of the logits, shifted labels."""
    chunked = prepare(a_predictor(backbone), f"{method}+chunked_loss", seed=0).model
    plain = prepare(a_predictor(backbone), method, seed=0).model
    batch = a_batch_for(plain)
    assert bool((batch["labels"] == -100).any())

    torch.manual_seed(7)  # as `gradients`: a decoder's range is calibrated on what the encoder's dropout left
    assert chunked(**batch).logits is None
    assert_same(gradients(chunked, batch), gradients(plain, batch))


@pytest.mark.parametrize("backbone", ["opt", "bart"])
def test_bfloat16_and_autocast(backbone):
    """In half precision the loss is float32, and as near to the true one as transformers' own."""
    model = a_predictor(backbone, torch.bfloat16)
    batch = a_batch_for(model)
    chunked = prepare(deepcopy(model), "full+chunked_loss").model
    expected = model(**batch).loss.item()
    assert expected == pytest.approx(chunked(**batch).loss.item(), rel=2e-2)
    chunked.float()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(chunked, batch), gradients(model, batch), rel=2e-2)


def test_the_callers_count_of_tokens():
    """The loss is a sum over `num_items_in_batch`, a number or a tensor, where transformers' is."""
    model = a_predictor()
    chunked = prepare(deepcopy(model), "full+chunked_loss").model.eval()
    batch = a_batch_for(model.eval())
    for count in (7, torch.tensor(7)):
        expected = model(**batch, num_items_in_batch=count).loss.item()
        assert expected == pytest.approx(chunked(**batch, num_items_in_batch=count).loss.item(), rel=1e-6)


def test_no_token_has_a_label():
    """NaN and gradients of zero, as of transformers."""
    model = a_predictor()
    chunked = prepare(deepcopy(model), "full+chunked_loss").model
    batch = a_batch_for(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for each in (model, chunked):
        loss, gradient = gradients(each, batch)
        assert bool(loss.isnan())
        assert not any(bool(g.any()) for g in gradient.values())


@WITHOUT_TORCHS_OWN
@pytest.mark.parametrize("backbone", ["opt", "bart"])
def test_torchs_own_function(backbone):
    """Where it is taken it gives the same, also where no token has a label, and more than one backward."""
    model = a_predictor(backbone, torch.float32)
    chunked = prepare(deepcopy(model), "full+chunked_loss").model
    batch = a_batch_for(model)
    chunked.forward.loss.fused = True
    assert_same(gradients(chunked, batch), gradients(model, batch), rel=1e-4)

    loss = chunked(**batch).loss
    loss.backward(retain_graph=True)
    loss.backward()

    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradient = gradients(chunked, batch)
    assert bool(loss.isnan())
    assert not any(bool(g.any()) for g in gradient.values())


@WITHOUT_TORCHS_OWN
def test_torchs_own_function_hides_its_chunks():
    """Why it is not taken on the CPU: a dispatch mode sees one operator. When this fails, take it there too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    loss = InChunks()
    loss.fused = True
    with Watch():
        loss(a_head(torch.float32), torch.randn(16, 32, requires_grad=True), torch.arange(16), -100)
    assert any("linear_cross_entropy" in name for name in seen)
    assert not any(".mm." in name or ".addmm" in name for name in seen)


def test_a_head_with_dropout_draws_the_same_again():
    """The backward pass runs each chunk with the random numbers of the forward pass, which come one after the other."""
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(32, 120)).double()
    module.weight = module[1].weight
    head = Head(module, bias=None, cap=None, in_float32=False)
    h_ND = torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
    labels_N = torch.arange(40)
    loss = InChunks()
    torch.manual_seed(7)
    total = loss(head, h_ND, labels_N, -100)
    drawn = torch.rand(1)
    found = torch.autograd.grad(total, [h_ND, module.weight])

    torch.manual_seed(7)
    pieces = [
        head.summed(h, labels, -100) for h, labels in zip(h_ND.split(loss.rows), labels_N.split(loss.rows), strict=True)
    ]
    assert len(pieces) > 2
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(torch.stack(pieces).sum(), total)
    for gradient, expected in zip(found, torch.autograd.grad(sum(pieces), [h_ND, module.weight]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_chunks_are_added_in_the_precision_of_the_head(dtype):
    """In one buffer as large as the weight, as autograd adds them; more than one backward pass gives the same."""
    head = a_head(dtype, trained=True)
    h_ND = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    labels_N = torch.arange(64)
    labels_N[:9] = -100
    total = InChunks()(head, h_ND, labels_N, -100)

    total.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in (h_ND, head.module.weight)]
    total.backward()

    whole = torch.autograd.grad(head.summed(h_ND, labels_N, -100), [h_ND, head.module.weight])
    for tensor, first, expected in zip((h_ND, head.module.weight), once, whole, strict=True):
        assert first.dtype == dtype
        assert torch.equal(tensor.grad, 2 * first)
        assert float((first - expected).norm()) <= (1e-6 if dtype == torch.float32 else 1e-2) * float(expected.norm())
    assert not bool(h_ND.grad[:9].any())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_what_needs_no_gradient_gets_none(trained, wanted):
    """A frozen head, hidden states that come from frozen layers, or both."""
    head = a_head(torch.float32, trained=trained)
    h_ND = torch.randn(64, 32, requires_grad=wanted)
    total = InChunks()(head, h_ND, torch.arange(64), -100)

    assert (trained or wanted) == total.requires_grad
    if total.requires_grad:
        total.backward()
    assert wanted == (h_ND.grad is not None)
    assert trained == (head.module.weight.grad is not None)


def test_ordinary_switches_it_off():
    """What gradients are checked against is transformers' own loss, logits and all."""
    applied = prepare(a_predictor(), "lora+chunked_loss")
    batch = a_batch_for(applied.model)
    with applied.reference_autograd():
        assert applied.model(**batch).logits is not None
    assert applied.model(**batch).logits is None


@pytest.mark.parametrize("backbone", ["opt", "bart"])
def test_without_labels_or_gradients_nothing_changes(backbone):
    """Generation, logits without labels, evaluation: bit for bit, in tuples too."""
    model = a_predictor(backbone).eval()
    chunked = prepare(deepcopy(model), "full+chunked_loss").model
    batch = a_batch_for(model)
    prompt = {name: batch[name][:, :6] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), chunked.generate(**prompt, **options))
    assert list(model.state_dict()) == list(chunked.state_dict())
    with torch.no_grad():
        for expected, found in zip(
            model(**batch, return_dict=False)[:2], chunked(**batch, return_dict=False)[:2], strict=True
        ):
            assert torch.equal(expected, found)
    assert model(**batch).loss.item() == pytest.approx(chunked(**batch, return_dict=False)[0].item(), rel=1e-6)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_head(copy):
    """A copied or pickled model computes with its own weights."""
    model = prepare(a_predictor(), "full+chunked_loss").model
    batch = a_batch_for(model)
    copied = copy(model)
    expected = gradients(model, batch)
    assert_same(gradients(copied, batch), expected)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert_same(gradients(copied, batch), expected)


def test_a_model_without_a_vocabulary():
    """A classifier is refused, with what to do."""
    with pytest.raises(UserError, match=r"BertForSequenceClassification: chunked_loss needs a head .* causal_lm"):
        prepare(a_model(1), "lora+chunked_loss")


@pytest.mark.parametrize(("scale", "agrees"), [(1.0, True), (0.5, False)])
def test_families_that_are_not_listed_are_tried(scale, agrees):
    """Cohere multiplies its logits by a number that the lever knows nothing of."""
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=scale, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CohereForCausalLM(config).train()
    model.lm_head.weight.data.normal_()
    assert agrees == VocabularyLoss(model, InChunks()).agrees()
    assert model.model.training


def test_chunks():
    """As many tokens as there is room for, but never all; a sixteenth where the room is not known; not too few."""
    head = a_head(torch.float32)
    row = 3 * 4 * len(head.module.weight)

    assert 1000 == chunk_rows(65_536, 1000 * row, head)
    assert 65_536 // 2 == chunk_rows(65_536, 10**12, head)
    assert FEWEST == chunk_rows(65_536, 0, head)
    assert 1024 // CHUNKS == chunk_rows(1024, 0, head)
    assert 65_536 // CHUNKS == chunk_rows(65_536, None, head)
    assert 1 == chunk_rows(3, None, head)


def test_room_of_a_trained_head_is_less():
    """Beside a chunk's logits there is a gradient as large as the weight."""
    head = a_head(torch.float32, trained=True, hidden=4096)
    weight = head.module.weight.nbytes
    row = 4 * len(head.module.weight)

    assert FEWEST == chunk_rows(65_536, weight, head)
    assert 300 == chunk_rows(65_536, weight + 300 * row, head)


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft1-exact"])
def test_the_lever_engages_and_holds_less(method):
    """Activation memory falls by more than one copy of the logits, counted in a step that runs in two micro-batches."""
    changes = {"model_config_overrides": SMALL_OPT | {"vocab_size": 2000}, "micro_batch_size": 2, "sequence_length": 64}
    peaks = []
    for name in (method, f"{method}+chunked_loss"):
        cell = a_cell(name, **changes)
        step = build_step(cell, torch.device("cpu"))
        step.run()
        check_levers(step, cell)
        peaks.append(count_memory(step, steps=1, warmup=1)["activation_peak_bytes"].value)
    logits = 2 * 64 * 2000 * 4
    assert peaks[0] - peaks[1] > logits


def test_a_lever_that_was_not_honoured():
    """The cell asks for it, the logits are whole: error."""
    step = build_step(a_cell("lora"), torch.device("cpu"))
    step.run()
    with pytest.raises(CellFailure, match="chunked_loss: the head gave 64 rows"):
        check_levers(step, a_cell("lora+chunked_loss"))


def test_a_trace_sees_every_chunk():
    """Under tensors without values the step counts what it counts with them."""
    cell = a_cell("lora+checkpoint+chunked_loss", model_config_overrides=SMALL_OPT | {"vocab_size": 2000})
    step = build_step(cell, torch.device("cpu"))
    del step.batch["attention_mask"]
    measured = count_memory(step, steps=1, warmup=1)["activation_peak_bytes"].value
    assert measured == count_uncomputed(cell).activation_peak


def tripled(model):
    forward = type(model).forward

    def replaced(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = output.loss * 3
        return output

    model.forward = MethodType(replaced, model)


@pytest.mark.parametrize("method", ["full", "lora", "parallel", "meft1-exact"])
@pytest.mark.parametrize("backbone", ["llama", "bart"])
def test_a_forward_that_was_replaced_is_not_left_out(backbone, method):
    """By hand, or by accelerate, which wraps a model's forward; after the lever it may be, and is then called."""
    for replace in (tripled, Accelerator(cpu=True, mixed_precision="bf16").prepare):
        model = a_predictor(backbone, torch.float32)
        replace(model)
        forward = model.forward
        with pytest.raises(UserError, match=r"its forward was replaced on the instance.*apply the method first"):
            prepare(model, f"{method}+chunked_loss")
        assert model.forward is forward


def test_hooks_of_accelerate_on_the_model_are_called():
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = a_predictor("llama", torch.float32).eval()
    add_hook_to_module(model, Counting())
    batch = a_batch_for(model)
    expected = float(model(**batch).loss)
    tuned = prepare(model, "full+chunked_loss").model

    assert float(tuned(**batch).loss) == pytest.approx(expected, rel=1e-5)
    assert tuned(**batch).logits is None
    assert Counting.calls == 3


def test_a_class_whose_loss_was_patched_is_held_against_itself(monkeypatch):
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="its loss is not the cross-entropy of its head's output"):
        prepare(a_predictor("llama", torch.float32), "full+chunked_loss")


SHAPES = {
    "opt-125m": SMALL_OPT | {"hidden_size": 64, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "llama-3.2-1b": {**TINY["llama"][1], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256},
}


@pytest.mark.parametrize("method", ["lora+checkpoint", "meft1-exact"])
@pytest.mark.parametrize("model", SHAPES)
def test_a_larger_chunk_costs_no_memory(model, method, monkeypatch):
    """Of few classes a chunk has more than a sixteenth of the tokens, and the peak is that of chunks of eight."""
    found = []
    for rows in (None, 8):
        if rows:
            monkeypatch.setattr("meftbench.methods.levers.chunked_loss.chunk_rows", lambda *_, rows=rows: rows)
        overrides = SHAPES[model] | {"vocab_size": 500}
        cell = a_cell(f"{method}+chunked_loss", model=f"{model}@random", model_config_overrides=overrides)
        step = build_step(cell.model_copy(update={"sequence_length": 256}), torch.device("cpu"))
        peak = count_memory(step, steps=1, warmup=1)["activation_peak_bytes"].value
        found.append((peak, step.applied.levers["chunked_loss"].numbers()["loss_chunk_rows"].value))
    (peak, rows), (peak_of_small, _) = found

    assert rows > 4 * 256 // CHUNKS
    assert peak <= peak_of_small
