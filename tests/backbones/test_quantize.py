"""4-bit base weights under every method that freezes them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import meftbench
from meftbench.backbones.quantize import quantize
from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import read
from tests.models import a_batch_for, a_cell, a_model, gradients

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantize)"
)


def a_quantized(family="llama", layers=3):
    return quantize(a_model(layers, torch.bfloat16, backbone=family))


@installed
@pytest.mark.parametrize("method", ["lora", "parallel", "meft1", "meft1-exact", "meft3-exact"])
@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_methods_train_beside_four_bit_weights(family, method):
    """Every linear weight of the layers is packed, nothing of it is trained, every adapter has a gradient."""
    model = a_quantized(family)
    applied = prepare(model, method, seed=1)
    applied.model.to("cpu")  # quantises
    packed = [p for p in applied.model.parameters() if p.dtype == torch.uint8]

    loss, found = gradients(applied.model, a_batch_for(model))

    assert torch.isfinite(loss)
    assert 3 * 6 <= len(packed)
    assert all(float(g.abs().sum()) > 0 for name, g in found.items() if "lora_A" not in name)


@installed
def test_exact_reversal_is_exact_on_them():
    """Tiles on, strict: the streams are restored bit for bit, or backward would raise."""
    model = a_quantized(layers=6)
    applied = prepare(model, "meft1-exact", {"tiles": 3, "strict": True}, seed=1)
    applied.model.to("cpu")
    batch = a_batch_for(model)

    loss, _ = gradients(applied.model, batch)
    with applied.reference_autograd():
        assert torch.equal(loss, gradients(applied.model, batch)[0])


@installed
@pytest.mark.parametrize("method", ["lora", "meft1-exact"])
def test_an_evaluation_before_a_step_leaves_the_weights_as_they_are(method):
    """On processors with AVX512-BF16 bitsandbytes rearranges them for inference, and no step works after that.

    The flag is set by hand, as a model that transformers loaded has it on such a processor.
    """
    model = a_quantized()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    applied = prepare(model, method, seed=1)
    applied.model.to("cpu")
    batch = a_batch_for(model)
    before = [p.clone() for p in applied.model.parameters() if p.dtype == torch.uint8]

    with torch.no_grad():
        applied.model.eval()(**batch)
    applied.model.train()
    loss, found = gradients(applied.model, batch)

    after = [p for p in applied.model.parameters() if p.dtype == torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.isfinite(loss)
    assert all(bool(g.isfinite().all()) for g in found.values())


@installed
@pytest.mark.parametrize("method", ["lora", "meft1-exact"])
def test_a_loaded_adapter_can_be_evaluated_and_trained_on(method, tmp_path):
    """The rearrangement for inference is forbidden where an adapter is loaded, too."""
    meftbench.save_adapter(prepare(a_quantized(), method, seed=1).model, tmp_path)
    model = a_quantized()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True

    loaded = meftbench.load_adapter(model, tmp_path).to("cpu")
    batch = a_batch_for(model)
    with torch.no_grad():
        loaded.eval()(**batch)
    loss, _ = gradients(loaded.train(), batch)

    assert torch.isfinite(loss)


@installed
def test_groups_of_heads_need_whole_weights():
    """Packed weights have no rows to take; auto takes one group."""
    with pytest.raises(UserError, match="head_groups: attention cannot be cut into groups here"):
        prepare(a_quantized(), "meft1-exact", {"head_groups": 2}, seed=1)


def test_full_fine_tuning_of_them_is_refused(tmp_path):
    """A weight that is not a number cannot be trained: a suite that asks for it is one line."""
    file = tmp_path / "it.yaml"
    file.write_text(
        "schema: 1\nname: it\ngrid: {model: bert-tiny@random, method: full, precision: nf4, batch_size: 1, "
        "sequence_length: 8}\n"
    )

    with pytest.raises(UserError, match=r"precision: 4-bit weights cannot be trained; choose another method"):
        parse_suite(read(file))


@installed
def test_a_cell_of_them_is_measured():
    """All passes: the reference of the starting-point shift is the 4-bit model itself."""
    wide = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}  # a block of 64 weights is a row
    cell = a_cell("meft1-exact", precision="nf4", model_config_overrides=wide)

    found = measure_cell(cell, Protocol(warmup=1, steps=1)).metrics

    assert 0 == found["mismatched_elements"].value
    assert 0 < found["starting_point_shift"].value < 10


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    """What to install, in one line."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"bitsandbytes is not installed; pip install 'meftbench\[quantize\]'"):
        quantize(a_model(1))
