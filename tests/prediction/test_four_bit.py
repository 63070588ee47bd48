"""4-bit weights in traces: what they hold, and what products with them allocate."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from meftbench.backbones.quantize import pack_without_values, quantize, statistics_of
from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.plan.cell import Cell
from meftbench.prediction.predict import predict
from meftbench.prediction.trace import uncomputed_model
from tests.models import a_cell_of, a_model
from tests.prediction.test_trace import agree

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantize)"
)
A100 = find_profile("a100-80gb")
FAMILIES = ["bert", "llama", "opt"]


def test_a_weight_holds_half_a_byte_an_element_and_its_statistics():
    """In bytes, of n elements: n/2 packed, n/64 scales, 4·n/64/256 float32 of those, their offset, and two tables."""
    with torch.device("meta"):
        model = quantize(a_model(2, torch.bfloat16, backbone="llama"))
    shapes = [m.weight.shape for m in model.modules() if hasattr(m, "quant_state")]
    sizes = [rows * columns for rows, columns in shapes]

    pack_without_values(model)

    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert 2 * 7 == len(packed)  # q, k, v, o, gate, up and down of two layers
    assert [n // 2 for n in sizes] == [p.nbytes for p in packed]
    blocks = [-(-n // 64) for n in sizes]
    assert sum(b + 4 * -(-b // 256) + 4 + 4 * 16 + 4 * 256 for b in blocks) == sum(
        t.nbytes for t in statistics_of(model)
    )
    assert all(t.is_meta for t in statistics_of(model))


def test_weights_with_values_can_be_packed_after_those_without():
    """bitsandbytes keeps a table for later calls, which must have values."""
    import bitsandbytes

    with torch.device("meta"):
        pack_without_values(quantize(a_model(1, torch.bfloat16, backbone="llama")))

    model = quantize(a_model(1, torch.bfloat16, backbone="llama")).to("cpu")

    assert not any(table.is_meta for table in bitsandbytes.functional.name2qmap.values())
    assert all(bool(t.isfinite().all()) for t in statistics_of(model))


def test_models_without_such_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 3, device="meta"))
    weight = model[0].weight

    pack_without_values(model)

    assert weight is model[0].weight
    assert [] == list(statistics_of(model))


METHODS = ["lora", "lora+checkpoint", "parallel", "meft1", "meft1-exact", "meft3-exact"]
# Each family meets every second method, and each method two or all of the families.
MET = [(f, m) for turn, f in enumerate(FAMILIES) for number, m in enumerate(METHODS) if (turn + number) % 2 == 0]


@pytest.mark.parametrize(("family", "method"), MET)
def test_a_traced_step_is_a_computed_step_byte_for_byte(family, method):
    """Beside the packed weights' own bytes: what bitsandbytes and peft's layers for such weights allocate and save."""
    agree(a_cell_of(family, method, precision="nf4", batch_size=2), mask=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_each_weight_is_unpacked_in_forward_and_again_in_backward(family):
    """One at a time, in bfloat16. In backward not where nothing before it is trained: the first q, k and v."""
    cell = a_cell_of(family, "lora", precision="nf4", batch_size=2)
    weights = [
        p.quant_state.shape.numel() for p in uncomputed_model(cell).model.parameters() if hasattr(p, "quant_state")
    ]
    first = sum(weights[:3])

    predicted = predict(cell, A100)

    events = predicted.events[predicted.step_from :]
    unpacked = [event for event in events if event.kind == "alloc" and "dequantize_4bit" in event.origin]
    assert 2 * (2 * sum(weights) - first) == sum(event.nbytes for event in unpacked)
    alive, most = set(), 0
    for event in events:
        if event in unpacked:
            alive.add(event.key)
        elif event.kind == "free":
            alive.discard(event.key)
        most = max(most, len(alive))
    assert 1 == most


# One A100 80 GB, Mistral-7B v0.1, LoRA of rank 16 on q, k, v and o, 4096 tokens a sample, gradient checkpointing:
# fms-acceleration (Apache-2.0) at commit 876e2ed6, scripts/benchmarks/refs/a100_80gb.csv, rows accelerated-peft-bnb;
# torch 2.4.1, transformers 4.48.1. Bytes by batch size: allocated after a step, and the peak.
MEASURED = {
    4: (4_306_496_512, 16_373_838_336),
    8: (4_306_889_728, 28_412_178_944),
}
TABLES = 32 * 7 * 1024  # 256 float32 for each weight: one for all of them in the bitsandbytes of 2024
LORA = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))  # trained numbers


@pytest.mark.parametrize("batch_size", MEASURED)
def test_a_model_of_seven_billion_in_four_bits_is_predicted_as_it_was_measured(batch_size):
    """To 20 KB after a step, and to a quarter of a megabyte at the peak."""
    after_step, peak = MEASURED[batch_size]
    cell = Cell.of(
        "lora+checkpoint",
        method_params={"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        model="mistral-7b@random",
        model_config_overrides={"vocab_size": 32_000},
        batch_size=batch_size,
        sequence_length=4096,
        precision="nf4",
        head="causal_lm",
    )

    predicted = predict(cell, A100, versions=Versions.parse("torch=2.4,transformers=4.48"))

    assert after_step == pytest.approx(predicted.measured[-1].baseline - TABLES, abs=20_000)
    # The runs were under autocast, which keeps a bfloat16 copy of the float32 weights of LoRA until forward ends.
    assert peak == pytest.approx(predicted.peak - TABLES + 2 * LORA, abs=250_000)
