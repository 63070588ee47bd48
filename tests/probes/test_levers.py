"""What a cell asked for is observed to have happened, or the cell ends in error."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from long_profile import sampled
from meftbench.errors import CellFailure
from meftbench.measuring.build import build_step
from meftbench.measuring.measurers import measure_cell
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.prediction.trace import count_uncomputed
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.levers import check_levers
from tests.models import FOUR_LAYERS, METHODS, REVERSIBLE, TINY, a_cell, a_cell_of, a_step

LEVERS = ["", "+checkpoint", "+offload", "+checkpoint+offload"]


def trained_once(method, **changes):
    step = a_step(method, **changes)
    step.run()
    return step


@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_lever_engages_on_every_method(method, levers):
    """Forwards run again exactly where they should, bytes move exactly where they should, every gradient is there."""
    metrics = check_levers(trained_once(method + levers), a_cell(method + levers))

    recomputes = "checkpoint" in levers or method in REVERSIBLE
    assert recomputes == (metrics["forward_calls_ratio"].value > 1.5)
    assert metrics["forward_calls_ratio"].value <= 2.0
    assert ("offload" in levers) == (metrics["offloaded_bytes"].value > 0)


def test_checkpointing_that_was_not_honoured():
    """The cell asks for it, the model does not do it: error, not a number under a wrong name."""
    with pytest.raises(CellFailure, match="checkpoint: no layer ran again") as failure:
        check_levers(trained_once("lora"), a_cell("lora+checkpoint"))

    assert "lever-not-engaged" == failure.value.detail["type"]


def test_offloading_that_was_not_honoured():
    """No byte moved: error."""
    with pytest.raises(CellFailure, match="offload: no byte"):
        check_levers(trained_once("lora"), a_cell("lora+offload"))


def test_a_tensor_that_gets_no_gradient():
    """A trained tensor that the loss does not reach is an error with its name."""
    step = trained_once("parallel")
    step.model.register_parameter("stray", torch.nn.Parameter(torch.ones(2)))

    with pytest.raises(CellFailure, match="stray is trained and got no gradient"):
        check_levers(step, a_cell("parallel"))


@pytest.mark.parametrize("method", ["full", "lora", "meft3"])
def test_one_token_has_no_gradient_in_its_queries(method):
    """A sequence of a single token is no error: softmax over one score is constant, so that the gradients of queries
    and keys are zero or, by other kernels, rounding; they are counted as zero by both."""
    step = trained_once(method, sequence_length=1)
    metrics = check_levers(step, a_cell(method, sequence_length=1))

    of_attention = sum(".query" in name or ".key" in name for name in step.applied.trained())
    assert metrics["zero_grad_tensors"].value == of_attention
    assert (of_attention > 0) == (method != "meft3")


@pytest.mark.parametrize("noise", [0.0, 1e-30, 1e-9])
def test_rounding_in_place_of_zero_changes_no_count(noise):
    """The bias of keys has a true gradient of zero: what a kernel leaves there is counted the same."""
    step, noted = trained_once("full"), []
    for name, parameter in step.model.named_parameters():
        if name.endswith("key.bias"):
            parameter.register_hook(lambda gradient: torch.full_like(gradient, noise))
            noted.append(name)

    assert len(noted) == check_levers(step, a_cell("full"))["zero_grad_tensors"].value


def test_a_gradient_of_zeros():
    """All-zero gradients, silently, are what users of reversal ran into."""
    step = trained_once("meft1")
    name, parameter = next((n, p) for n, p in step.applied.trained().items() if n.endswith("down.weight"))
    parameter.register_hook(torch.zeros_like)

    with pytest.raises(CellFailure, match=f"the gradient of {re.escape(name)} is all zero"):
        check_levers(step, a_cell("meft1"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["lora", "lora+checkpoint", "meft1-exact", "parallel", "dora"])
@pytest.mark.parametrize("model", ["bert-tiny@random", "llama-3.2-1b@random"])
def test_a_gradient_that_is_small_because_of_where_the_weights_stand_is_none_of_zeros(model, method, optimizer):
    """LoRA's second factor begins at zero, and after a step of SGD it has hardly left it: the first one's gradient is
    as small. The weights stay as they were."""
    small = {} if "bert" in model else {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    small |= {} if "bert" in model else {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    cell = Cell.of(
        method, model=model, model_config_overrides=small, batch_size=4, sequence_length=16, optimizer=optimizer
    )
    step = build_step(cell, CPU)
    step.run()
    before = {name: parameter.detach().clone() for name, parameter in step.applied.trained().items()}

    check_levers(step, cell)

    assert all(torch.equal(before[name], parameter) for name, parameter in step.applied.trained().items())


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft3-exact"])
def test_images_are_measured(method):
    """A batch without a mask: every pass of the protocol, and tokens are patches and special tokens."""
    config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    cell = Cell.of(method, model="vit-tiny@random", model_config_overrides=config, batch_size=2, sequence_length=17)

    found = measure_cell(cell, Protocol(warmup=1, steps=2)).metrics

    assert found["activation_peak_bytes"].value > 0
    assert found["tokens_per_s"].value > 0


CPU = torch.device("cpu")


PEAKS_IN_MIXERS = {"gemma2", "qwen3_5", "qwen3_5_moe", "qwen3_next"}


def peak_of(backbone, method):
    """Counted activation peak of a cell whose levers were seen to do what they are for."""
    cell = a_cell_of(backbone, method)
    step = build_step(cell, CPU)
    peak = count_memory(step, 1, 1)["activation_peak_bytes"].value
    check_levers(step, cell)
    return peak


OF_EACH_FORM = ["bert", "bart", "opt-post", "vit", "llama", "gemma2", "gemma3", "mixtral", "qwen3_5", "qwen3_next"]


@pytest.mark.parametrize(
    ("backbone", "method"),
    sampled(
        [
            *((name, "parallel") for name in OF_EACH_FORM),
            *((name, "lora") for name in ("bert", "bart", "llama", "mixtral")),
        ],
        every=3,
    ),
)
def test_checkpointing_and_tiles_save_what_they_must_on_every_backbone(backbone, method):
    """Alone and together, whoever runs the layers: transformers' classes, or their sublayers where an adapter is in."""
    alone, tiled = peak_of(backbone, f"{method}+checkpoint"), peak_of(backbone, f"{method}+tiled_mlp")
    both = peak_of(backbone, f"{method}+checkpoint+tiled_mlp")
    without = peak_of(backbone, method)

    assert alone < (0.8 if backbone in PEAKS_IN_MIXERS else 0.75) * without
    assert tiled < 0.95 * without
    # Gemma 2 without fused attention, and delta nets in torch's operators, peak there, whatever the feed-forward does.
    assert both < min(alone, tiled) or (both == alone and backbone in PEAKS_IN_MIXERS)


@given(
    st.sampled_from(sorted(TINY)),
    st.sampled_from(METHODS),
    st.sets(st.sampled_from(["checkpoint", "offload", "tiled_mlp"]), min_size=1, max_size=2),
)
@settings(max_examples=10)
def test_levers_in_pairs_are_seen_to_engage(backbone, method, levers):
    """Any backbone, any method; on an ordinary method none of them raises the peak. On reversible ones `checkpoint`
    stands in the place of reversal, and offloading does not reach into a layer that runs again."""
    peak = peak_of(backbone, "+".join([method, *sorted(levers)]))

    if method not in REVERSIBLE:
        assert peak < peak_of(backbone, method)


@pytest.mark.parametrize("backbone", ["llama", "opt", "bert"])
def test_a_checkpointed_layer_with_adapters_is_predicted_as_it_is_counted(backbone):
    """The prediction goes by the same layers."""
    cell = a_cell_of(backbone, "parallel+checkpoint+tiled_mlp")

    assert count_uncomputed(cell, warmup=1).activation_peak == peak_of(backbone, "parallel+checkpoint+tiled_mlp")


@pytest.mark.parametrize("levers", ["+checkpoint", "+checkpoint+tiled_mlp"])
@pytest.mark.parametrize("backbone", ["bert", "llama", "opt"])
def test_a_single_layer_that_is_not_checkpointed_is_named(backbone, levers):
    """Tiles that run again are no evidence of it."""
    cell = a_cell_of(backbone, f"lora{levers}")
    step = build_step(cell, CPU)
    step.run()
    layers = [m for m in step.model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    layers[-1].gradient_checkpointing = False

    with pytest.raises(CellFailure, match=r"checkpoint: .*\.2 did not run again in backward \(1 of 3\)"):
        check_levers(step, cell)


def test_tiles_that_did_not_run_are_named():
    """One layer runs its feed-forward whole."""
    cell = a_cell_of("llama", "lora+tiled_mlp")
    step = build_step(cell, CPU)
    step.run()
    step.model.get_submodule("base_model.model.model.layers.1").__dict__.pop("forward")
    step.applied.levers["tiled_mlp"].tiling.tiles = 1

    with pytest.raises(CellFailure, match="tiled_mlp: 2 tiles ran again in backward, for 3 layers"):
        check_levers(step, cell)


def test_checkpointing_that_nobody_asked_for():
    """A layer that runs again under a cell without the lever is an error with its name."""
    step = trained_once("lora+checkpoint")

    with pytest.raises(CellFailure, match=r"checkpoint: .*layer\.0 ran again in backward although it is off"):
        check_levers(step, a_cell("lora"))


@pytest.mark.parametrize("settings", [{}, {"tiles": 2}, {"output": "mean"}])
@pytest.mark.parametrize(
    ("method", "layers"), [("meft1-exact", 1), ("meft3-exact", 1), ("meft1", 1), ("meft1-exact", 2)]
)
def test_a_single_reversible_layer_is_no_fault(method, layers, settings):
    """Its graph is kept, so that nothing runs again in backward; a model of one layer is the same."""
    if method == "meft1" and "tiles" in settings:
        settings = {}
    settings = settings | {"reversible_layers": 1}
    shape = {"model_config_overrides": FOUR_LAYERS | {"vocab_size": 120, "num_hidden_layers": layers}}
    found = check_levers(trained_once(method, method_params=settings, **shape), a_cell(method))
    assert found["zero_grad_tensors"].value >= 0
