"""What a cell asked for is observed to have happened, or the cell ends in error."""

from __future__ import annotations

import pytest
import torch

from meftbench.errors import CellFailure
from meftbench.measurement import measure_cell
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.probes.levers import check_levers
from tests.models import METHODS, a_cell, a_step

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

    recomputes = "checkpoint" in levers or method.startswith("meft")
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
    """Adapters whose output is cut off: all-zero gradients, silently, are what users of reversal ran into."""
    step = trained_once("meft1")
    step.applied.zero_adapters()

    with pytest.raises(CellFailure, match="is all zero"):
        check_levers(step, a_cell("meft1"))


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft3-exact"])
def test_images_are_measured(method):
    """A batch without a mask: every pass of the protocol, and tokens are patches and special tokens."""
    config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    cell = Cell.of(method, model="vit-tiny@random", model_config_overrides=config, batch_size=2, sequence_length=17)

    found = measure_cell(cell, Protocol(warmup=1, steps=2)).metrics

    assert found["activation_peak_bytes"].value > 0
    assert found["tokens_per_s"].value > 0
