"""`+checkpoint` of some layers, or keeping what attention gave: the same gradients, and exactly the memory it says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import meftbench
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import build_step
from meftbench.methods import prepare
from meftbench.methods.levers import attention_kept
from meftbench.plan.suite import load_suite
from meftbench.prediction.predict import predict
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.levers import check_levers
from tests.models import TINY, a_batch_for, a_cell_of, a_model, gradients, worst_relative_error

CPU = torch.device("cpu")
WIDTH, HEADS = 32, 4


@given(
    backbone=st.sampled_from(sorted(TINY)),
    method=st.sampled_from(["full", "lora", "houlsby", "meft2", "meft3-exact", "lora-fa"]),
    keep=st.sampled_from(["layer_input", "attention"]),
    every=st.integers(1, 3),
    layers=st.sampled_from(["all", 1, 2]),
    other=st.sampled_from(["", "+tiled_mlp", "+offload"]),
)
@settings(max_examples=8)
def test_gradients_are_those_of_the_plain_method(backbone, method, keep, every, layers, other):
    """Whichever layers run again and whatever they keep, with dropout (under which attention may run in products)."""
    keep = "layer_input" if backbone == "gemma2" else keep  # whose scores are capped, which no fused operator does
    model = a_model(3, backbone=backbone)
    label = f"{method}+checkpoint(keep={keep},every={every},layers={layers}){other}"
    applied, batch = prepare(model, label, seed=1), a_batch_for(model)

    with applied.around_forward():
        loss, found = gradients(applied.model, batch)
    with applied.reference_autograd():
        expected_loss, expected = gradients(applied.model, batch)

    assert torch.equal(expected_loss, loss)
    # A key's bias has a true gradient of zero, which is compared with the largest.
    sizes = {name: float(gradient.norm()) for name, gradient in expected.items()}
    floor = 1e-3 * max(sizes.values())
    assert all(float((found[n] - expected[n]).norm()) <= 1e-12 * max(size, floor) for n, size in sizes.items())


def measured(backbone, method, layers=4):
    numbers = count_memory(build_step(a_cell_of(backbone, method, layers=layers), CPU), 0, 1)
    return numbers["saved_bytes"].value, numbers["activation_peak_bytes"].value


@pytest.mark.parametrize("backbone", ["llama", "vit"])
def test_attention_costs_its_output_and_its_log_sum_exp(backbone):
    """Four bytes an element, and four for each query and head, of every layer; at the peak the layer that runs again
    would hold them anyway."""
    tokens = 4 * (64 if backbone != "vit" else (32 // 8) ** 2 + 1)
    inputs, inputs_peak = measured(backbone, "lora+checkpoint")
    attention, attention_peak = measured(backbone, "lora+checkpoint(keep=attention)")

    blocks = -(-tokens * 4 * WIDTH // 512) * 512 + -(-tokens * 4 * HEADS // 512) * 512
    assert 4 * blocks == attention - inputs
    assert 3 * blocks == attention_peak - inputs_peak


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_half_of_the_layers_are_half_way_between_all_and_none(backbone):
    """What is saved lies on the line between the two, but for what all layers save together (positions, a mask). The
    peak has that as well, and where the last layer runs again, all that it saves."""
    (none, none_peak), (every, every_peak), (second, second_peak), (first, first_peak) = (
        measured(backbone, f"full{lever}")
        for lever in ("", "+checkpoint", "+checkpoint(every=2)", "+checkpoint(layers=2)")
    )

    of_layer = (none - every) / 4
    assert every + 2 * of_layer == pytest.approx(second, rel=0.02)
    assert every + 2 * of_layer == pytest.approx(first, rel=0.02)
    assert every_peak < first_peak <= second_peak < none_peak
    assert second_peak - every_peak <= 2 * of_layer * 1.02


def test_attention_is_not_computed_twice():
    """torch's count of operations: what `keep=attention` saves of a step is one attention of each layer."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def operations(lever):
        step = build_step(a_cell_of("opt", f"full{lever}"), CPU)
        counts = {kernel: lambda q, k, v, *_, **__: 2 * (2 * q.numel() * k[-2])}
        with FlopCounterMode(display=False, custom_mapping=counts) as counted:
            step.forward_backward()
        return counted.get_total_flops()

    products = 2 * (2 * 4 * HEADS * 64 * 64 * (WIDTH // HEADS))  # queries by keys, then weights by values
    assert 3 * products == operations("+checkpoint") - operations("+checkpoint(keep=attention)")


@pytest.mark.parametrize("kept", ["keep=attention", "every=2", "layers=2", "keep=attention,every=2"])
@pytest.mark.parametrize(("backbone", "method"), [("bert", "full"), ("llama", "lora"), ("bert", "meft1-exact")])
def test_the_lever_is_seen_to_engage(backbone, method, kept):
    """On ordinary layers, and on reversible blocks, which are checkpointed or keep what they save."""
    method = f"{method}+checkpoint({kept})"
    step = build_step(a_cell_of(backbone, method), CPU)
    step.run()

    ratio = check_levers(step, a_cell_of(backbone, method))["forward_calls_ratio"].value

    assert (1.3 < ratio < 1.75) if "=2" in kept else (ratio > 1.85)


@pytest.mark.parametrize("method", ["lora", "meft3-exact"])
def test_layers_that_were_not_to_run_again_are_named(method):
    """And those that were, and did not."""
    step = build_step(a_cell_of("llama", f"{method}+checkpoint(every=2)"), CPU)
    step.run()
    step.applied.levers.clear()
    with pytest.raises(CellFailure, match=r"\.1 did not run again in backward \(1 of 3\)"):
        check_levers(step, a_cell_of("llama", f"{method}+checkpoint"))
    with pytest.raises(CellFailure, match=r"\.2 ran again in backward, and was to keep what it saves"):
        check_levers(step, a_cell_of("llama", f"{method}+checkpoint(layers=1)"))


def test_attention_that_ran_again_is_named():
    """The model is checkpointed as usual, and the cell asks for selective checkpointing."""
    step = build_step(a_cell_of("llama", "lora+checkpoint"), CPU)
    step.applied.levers.clear()
    step.run()

    with pytest.raises(CellFailure, match=r"checkpoint: attention ran again in backward in .*layers\.2 \(1 times\)"):
        check_levers(step, a_cell_of("llama", "lora+checkpoint(keep=attention)"))


def test_attention_in_plain_products_is_named():
    """Dropout in attention on a CPU: torch silently takes no fused operator, so nothing would be kept."""
    cell = a_cell_of("opt", "lora+checkpoint(keep=attention)")
    dropped = cell.model_copy(
        update={"model_config_overrides": cell.model_config_overrides | {"attention_dropout": 0.5}}
    )
    step = build_step(dropped, CPU)
    step.run()

    with pytest.raises(CellFailure, match=r"no fused attention operator ran in .*layers\.0, so that none was kept"):
        check_levers(step, dropped)


@pytest.mark.parametrize("profile", ["a100-80gb", "h200"])
def test_a_gpu_would_keep_the_same(profile):
    """Flash attention and cuDNN's, predicted in bf16: output and log-sum-exp, and two blocks for random numbers."""

    def saved(lever):
        cell = a_cell_of("llama", f"lora+checkpoint{lever}", layers=4, sequence_length=256, precision="bf16")
        return predict(cell, find_profile(profile)).metrics()["saved_bytes"].value

    tokens = 4 * 256
    assert 4 * (tokens * WIDTH * 2 + tokens * HEADS * 4 + 2 * 512) == saved("(keep=attention)") - saved("")


def test_a_prediction_without_a_fused_operator_is_refused():
    """In fp32 with grouped queries CUDA runs plain products: nothing would be kept."""
    cell = a_cell_of("llama", "lora+checkpoint(keep=attention)")
    with pytest.raises(UserError, match=r"keep=attention would keep nothing on .*; change the settings of checkpoint"):
        predict(cell, find_profile("a100-80gb"))


@pytest.mark.parametrize(
    ("method", "kept"),
    [("lora", "every=2"), ("parallel", "keep=attention"), ("meft1-exact", "layers=1,keep=attention")],
)
def test_in_a_training_script(method, kept):
    """Applied by its label, copied, pickled, trained, and taken off again."""
    model = a_model(3, torch.float32, "llama", dropout=0.0, head="causal_lm")
    before = {name: type(module) for name, module in model.named_modules()}
    applied = meftbench.apply_method(model, f"{method}+checkpoint({kept})", seed=1)
    batch = a_batch_for(model)

    expected = gradients(applied, batch)
    for other in (copy.deepcopy(applied), pickle.loads(pickle.dumps(applied))):
        loss, found = gradients(other, batch)
        assert torch.equal(expected[0], loss)
        assert 0 == worst_relative_error(found, expected[1])

    unloaded = meftbench.unload(applied)

    assert before == {name: type(module) for name, module in unloaded.named_modules()}
    flags = {vars(module).get("gradient_checkpointing", False) for module in unloaded.modules()}
    assert {False} == flags
    assert not any("_gradient_checkpointing_func" in vars(module) for module in unloaded.modules())


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("lora+checkpoint(layers=9)", r"checkpoint\(layers\): 9 of 4 layers; write all, or a number from 1 to 4"),
        ("lora+checkpoint(layers=0)", "0 of 4 layers"),
        ("lora+checkpoint(every=0)", "greater than or equal to 1"),
        ("lora+checkpoint(keep=outputs)", "keep"),
        ("lora+checkpoint(often=2)", "unknown key 'often'"),
        ("lora+checkpoint+compile(budget=0.5)", "both decide what a layer keeps"),
    ],
)
def test_what_does_not_apply_is_one_line(method, line):
    model = a_model()
    with pytest.raises(UserError, match=line) as caught:
        meftbench.apply_method(model, method)
    assert 1 == len(str(caught.value).splitlines())
    assert not any(parameter.requires_grad is False for parameter in model.parameters())


SUITE = """\
schema: 1
name: refused
grid:
  model: bert-tiny@random
  method: lora+checkpoint(keep=attention)
  attention: eager
  batch_size: 1
  sequence_length: 8
"""


def test_eager_attention_is_refused_before_anything_is_built(tmp_path):
    """In a suite, and in a script."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE)
    with pytest.raises(UserError, match=r"suite\.yaml.*eager attention runs plain products; take attention: sdpa"):
        load_suite(suite)
    with pytest.raises(UserError, match="eager attention runs plain products"):
        meftbench.apply_method(a_model(2, backbone="gemma2"), "lora+checkpoint(keep=attention)")


def test_operators_that_are_attention():
    """Those of torch for every device, forward only."""
    names = [name for name in dir(torch.ops.aten) if "_scaled_dot_product" in name]
    names += ["_scaled_dot_product_cudnn_attention", "_flash_attention_forward", "_efficient_attention_backward"]
    chosen = {name for name in names if attention_kept.is_fused_attention(getattr(torch.ops.aten, name).default)}

    assert {name for name in names if "backward" not in name} == chosen
    assert not attention_kept.is_fused_attention(torch.ops.aten.bmm.default)
