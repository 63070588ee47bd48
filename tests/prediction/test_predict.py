"""Memory on a GPU that is not there: rules of the overlay against numbers worked out by hand, and whole steps."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import Training
from meftbench.prediction.overlay import attention_kernel, cuda_semantics
from meftbench.prediction.predict import predict
from meftbench.prediction.trace import uncomputed_step
from tests.models import a_cell, a_cell_of

MIB = 2**20
A100, T4 = find_profile("a100-80gb"), find_profile("t4")


def saved_bytes(function, *inputs):
    """Bytes of the storages that autograd keeps for `function`, the inputs' own aside."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    return sum(nbytes for key, nbytes in kept.items() if key not in own), result


@pytest.mark.parametrize(
    ("dtype", "size", "masked", "grouped", "capability", "dropout", "expected"),
    [
        (torch.bfloat16, 64, False, False, (8, 0), 0.0, "flash"),
        (torch.bfloat16, 64, False, True, (8, 0), 0.0, "flash"),  # grouped queries are flash's own
        (torch.bfloat16, 64, True, False, (8, 0), 0.0, "efficient"),  # flash takes no mask
        (torch.float16, 64, False, False, (7, 5), 0.0, "efficient"),  # flash begins with Ampere
        (torch.float32, 64, False, False, (9, 0), 0.0, "efficient"),
        (torch.float32, 64, False, True, (9, 0), 0.0, "math"),
        (torch.float32, 66, False, False, (8, 0), 0.0, "math"),  # rows of whole 16 bytes
        (torch.bfloat16, 64, False, False, (9, 0), 0.0, "cudnn"),  # Hopper prefers cuDNN
        (torch.bfloat16, 128, True, True, (10, 0), 0.0, "cudnn"),  # which takes a mask, and grouped queries
        (torch.bfloat16, 64, False, False, (9, 0), 0.1, "flash"),  # but dropout in sixteenths alone
        (torch.bfloat16, 64, False, False, (9, 0), 0.125, "cudnn"),
        (torch.bfloat16, 256, False, False, (9, 0), 0.0, "flash"),  # and no such heads backward
        (torch.bfloat16, 64, False, False, (12, 0), 0.0, "flash"),  # Blackwell for desktops
        (torch.float64, 64, False, False, (9, 0), 0.0, "math"),
    ],
)
def test_the_kernel_that_attention_takes(dtype, size, masked, grouped, capability, dropout, expected):
    """By dtype, head size, mask, grouped queries, compute capability and dropout."""
    assert expected == attention_kernel(dtype, size, masked, grouped, capability, dropout)


def test_dropout_keeps_a_byte_an_element():
    """native_dropout: a bool mask instead of the CPU's mask in the input's dtype."""
    with FakeTensorMode(), cuda_semantics(A100):
        x = torch.empty(4, 1000, requires_grad=True)
        kept, _ = saved_bytes(lambda x: F.dropout(x, 0.1, True), x)
    assert 4000 == kept


def test_attention_keeps_its_output_and_a_statistic():
    """flash: out (2·3·128·64 in bf16) and logsumexp (2·3·128 in float32), beside q, k, v and the random state."""
    with FakeTensorMode(), cuda_semantics(A100):
        q, k, v = (torch.empty(2, 3, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        kept, _ = saved_bytes(lambda *t: F.scaled_dot_product_attention(*t, dropout_p=0.1), q, k, v)
    assert 2 * 3 * 128 * 64 * 2 + 2 * 3 * 128 * 4 <= kept <= 2 * 3 * 128 * 64 * 2 + 2 * 3 * 128 * 4 + 64


@pytest.mark.parametrize("on_meta", [True, False])
def test_cudnns_attention_keeps_what_flash_keeps(on_meta):
    """Out and logsumexp, whether keys are as many as queries or shared; backward gives gradients of their shapes."""
    from contextlib import nullcontext

    device = "meta" if on_meta else "cpu"
    with nullcontext() if on_meta else FakeTensorMode(), cuda_semantics(find_profile("h200")):
        q = torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        k, v = (torch.empty(2, 2, 128, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2))
        kept, out = saved_bytes(lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True, is_causal=True), q, k, v)
        found = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))

    expected = 2 * 4 * 128 * 64 * 2 + 2 * 4 * 128 * 4
    assert expected <= kept <= expected + 64
    assert [tuple(t.shape) for t in (q, k, v)] == [tuple(t.shape) for t in found]


def test_attention_by_products_keeps_scores_and_mask():
    """math in float64: softmax (B·H·Q·K·8), the dropout mask (a byte each) and what dropout gave, and both scaled."""
    with FakeTensorMode(), cuda_semantics(A100):
        q, k, v = (torch.empty(2, 3, 128, 64, dtype=torch.float64, requires_grad=True) for _ in range(3))
        kept, _ = saved_bytes(lambda *t: F.scaled_dot_product_attention(*t, dropout_p=0.1), q, k, v)
    scores = 2 * 3 * 128 * 128
    assert scores * (8 + 1 + 8) + 2 * (2 * 3 * 128 * 64 * 8) == kept


def test_auto_tiles_are_those_of_the_device():
    """65,536 tokens of width 768 on 108 multiprocessors: tiles of max(4096, 4·108·128²/(4·768) = 2304) tokens."""
    from meftbench.reversible.sublayers import tiles_of

    with cuda_semantics(A100):
        assert 16 == len(tiles_of(65536, "auto", 768, torch.device("cpu")))
        assert 9 == len(tiles_of(65536, "auto", 256, torch.device("cpu")))  # 4·108·128²/1024 = 6912


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft1-exact", "lora+offload+weight_offload"])
def test_meta_and_fake_tensors_tell_one_story(method, monkeypatch):
    """The fast trace, on the meta device, and the one with fake CPU tensors count the same step."""
    from meftbench.prediction import tracer as module

    cell = a_cell(method)
    fast = predict(cell, A100)
    monkeypatch.setattr(module, "uncomputed_step", lambda cell, foreach, **_: uncomputed_step(cell, foreach=foreach))
    slow = predict(cell, A100)

    assert fast.measured[0].activation_peak == slow.measured[0].activation_peak
    assert fast.peak == slow.peak


# Prototype's activation MiB (issue 5): eager attention, BERT-base, 32 × 512 tokens, fp32, dropout 0.1.
@pytest.mark.parametrize(
    ("method", "expected"), [("full", 20174), ("full+checkpoint", 2516), ("lora", 16755), ("lora+checkpoint", 2325)]
)
def test_bert_base_by_products_is_the_prototypes(method, expected):
    """Within 3 %. (MEFT has become leaner than the prototype's since.)"""
    cell = Cell.of(method, model="bert-base@random", batch_size=32, sequence_length=512, attention_requested="eager")
    assert expected == pytest.approx(predict(cell, A100).measured[0].activation_peak / MIB, rel=0.03)


def test_a_predicted_cell_is_a_record_like_others():
    """Every number says that it is predicted; the breakdown sums to the peak; reserved covers what is allocated."""
    cell = a_cell("meft1-exact", device="predicted:a100-80gb")

    found = measure_cell(cell, Protocol(warmup=1, steps=2)).metrics

    peak = found["peak_allocated_bytes"]
    assert "predicted" == peak.source
    parts = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporaries", "inputs", "other")
    assert peak.value == sum(found[f"{part}_bytes"].value for part in (*parts, "workspace"))
    assert 2 * A100.cublas_workspace_bytes == found["workspace_bytes"].value  # of two threads
    assert peak.value <= found["peak_active_bytes"].value <= found["peak_reserved_bytes"].value
    assert found["process_device_bytes"].value == found["peak_reserved_bytes"].value + A100.context_bytes
    assert 0 == found["drift_bytes_per_step"].value


def test_what_does_not_fit_is_out_of_memory():
    """A 6.7B model is not trained whole on a T4: the cell ends as oom and says what was asked for."""
    cell = Cell.of(
        "full", model="opt-6.7b@random", batch_size=1, sequence_length=64, precision="fp32", device="predicted:t4"
    )

    with pytest.raises(CellFailure) as caught:
        measure_cell(cell, Protocol(warmup=1, steps=1))

    assert "oom" == caught.value.status
    assert caught.value.detail["peak_allocated_bytes"] > T4.memory_bytes


def test_what_a_trace_cannot_follow_is_named():
    """BART's classifier looks at token values: one line says so and what to ask for instead."""
    small = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 48, "vocab_size": 99}
    cell = Cell.of("lora", model="bart-base@random", model_config_overrides=small, batch_size=2, sequence_length=8)

    with pytest.raises(UserError, match=r"looks at values.*seq2seq_lm"):
        predict(cell, A100)


@pytest.mark.parametrize(
    ("method", "precision"),
    [("meft1-exact", "bf16-autocast"), ("meft1", "fp32"), ("lora+checkpoint", "fp32"), ("ia3", "fp32")],
)
def test_a_prediction_makes_no_library_warn(method, precision):
    """FakeTensors are asked for no data pointer, and peft for nothing under a deprecated name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", UserWarning)

        assert predict(a_cell(method, precision=precision), A100).peak > 0


def a_small_llama(method="lora", vocabulary=120, **changes):
    """Two layers of four heads, of which two share their keys and values."""
    shapes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    values = {"batch_size": 2, "sequence_length": 64} | changes
    return Cell.of(method, model="llama-3.2-1b@random", model_config_overrides=shapes | heads, **values)


def test_older_transformers_repeat_shared_keys_for_attention():
    """In float32 shared heads take plain products now; repeated ones had the efficient kernel. An encoder has none."""
    cell = a_small_llama()
    now, before = (predict(cell, A100, versions=versions) for versions in (NOW, Versions(transformers=(4, 54))))

    assert set() == now.attention
    assert {"scaled_dot_product_efficient_attention"} == {name.strip("_") for name in before.attention}
    encoder = a_cell("lora")
    assert predict(encoder, A100).peak == predict(encoder, A100, versions=Versions(transformers=(4, 54))).peak


def test_the_keys_that_older_transformers_repeat_are_not_kept():
    """Forward of layers that are recomputed holds their inputs, whatever happened within."""
    cell = a_small_llama("lora+checkpoint", precision="bf16")
    older = Versions(transformers=(4, 54))

    assert predict(cell, A100).measured[-1].saved == predict(cell, A100, versions=older).measured[-1].saved


def test_older_losses_hold_the_logits_in_float32():
    """And a copy without the last position. Before 4.46 forward converts them, and those in 16 bits are not kept."""
    cell = a_small_llama(vocabulary=5000, sequence_length=65, precision="bf16")
    now, in_loss, in_forward = (
        predict(cell, A100, versions=Versions.parse(text)).measured[-1].activation_peak
        for text in ("", "transformers=4.48", "transformers=4.45")
    )

    logits = 2 * 65 * 5000
    assert 0 < in_loss - now <= 4 * logits + 2 * logits
    assert 2 * logits == pytest.approx(in_loss - in_forward, rel=0.02)


def test_softmax_kept_its_input_before_torch_1_11():
    """Scores of 4 heads, 64 x 64, of 2 samples in 4 layers, in float32, where attention is by plain products."""
    cell = a_cell("full", attention_requested="eager", sequence_length=64)
    now, then = (predict(cell, A100, versions=Versions.parse(text)).measured[-1] for text in ("", "torch=1.10"))

    layers, scores = 4, cell.batch_size * 4 * 64 * 64 * 4
    assert layers * scores == pytest.approx(then.saved - now.saved, rel=0.3)


@pytest.mark.parametrize(("profile", "kernels"), [("a100-40gb", {"varlen_attn"}), ("t4", set())])
def test_packed_rows_are_read_by_one_kernel_where_there_is_one(profile, kernels):
    """From Ampere on, in half precision. It keeps its output, and one float32 for each query and head, as flash
    attention does; half of that goes with half of the tokens. Elsewhere each sample is read as in a batch."""
    shape = {"head": "causal_lm", "batch_size": 8, "sequence_length": 256, "precision": "bf16"}
    packed, plain = (a_cell_of("llama", "lora", packing=packing, **shape) for packing in (True, False))

    whole, half = (predict(packed, find_profile(profile), padding=padding) for padding in (0.0, 0.5))

    saved = whole.measured[0].saved
    assert kernels == whole.attention == half.attention
    assert saved == pytest.approx(predict(plain, find_profile(profile)).measured[0].saved, rel=0.03)
    assert half.measured[0].saved == pytest.approx(saved / 2, rel=0.03) or not kernels


def test_a_cell_with_padding_is_predicted_where_it_is_packed():
    """A padded one is refused; so is a packed training, whose rows a prediction does not read."""
    packed = a_cell_of("llama", "lora", head="causal_lm", packing=True, device="predicted:t4")
    half = Protocol(padding=0.5, warmup=1, steps=1)

    metrics = measure_cell(packed, half).metrics

    assert (
        metrics["activation_peak_bytes"].value
        < measure_cell(packed, Protocol(warmup=1, steps=1)).metrics["activation_peak_bytes"].value
    )
    with pytest.raises(UserError, match=r"padding .* cannot be predicted.*or take packing: true"):
        measure_cell(packed.model_copy(update={"packing": False}), half)
    training = Training(task="sciq")
    with pytest.raises(UserError, match="as long as its texts"):
        measure_cell(packed.model_copy(update={"training": training}), half)
