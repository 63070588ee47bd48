"""One cell through all its passes."""

from __future__ import annotations

import pytest
import torch

import meftbench
from meftbench.catalogue.metrics import METRICS
from meftbench.errors import NOT_COMPARABLE, CellFailure, UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.plan.protocol import Protocol
from tests.models import FOUR_LAYERS, a_batch, a_cell, a_model

QUICK = Protocol(warmup=1, steps=2)


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft1", "meft3+offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
def test_a_cell_yields_every_group_of_metrics(method, precision):
    """Memory, speed, fidelity, size and levers, every name known, in every precision."""
    outcome = measure_cell(a_cell(method, precision=precision), QUICK)

    assert set(outcome.metrics) <= set(METRICS)
    for name in ("activation_peak_bytes", "tokens_per_s", "starting_point_shift", "parameters_trainable", "build_s"):
        assert outcome.metrics[name].value is not None
    assert "random tokens" == outcome.observed["inputs"]


def test_the_attention_that_ran_is_recorded():
    """sdpa takes the fused CPU kernel without attention dropout and falls to math with it; eager is eager."""

    def used(dropout, attention):
        overrides = FOUR_LAYERS | {"vocab_size": 120, "attention_probs_dropout_prob": dropout}
        cell = a_cell("lora", model_config_overrides=overrides, attention_requested=attention)
        return measure_cell(cell, Protocol(warmup=1, steps=1, passes=("memory",))).observed["attention_used"]

    assert "flash_attention" in used(0.0, "sdpa")
    assert "sdpa: math" == used(0.1, "sdpa")
    assert "eager" == used(0.0, "eager")


def test_only_the_passes_asked_for_are_run():
    """A protocol with the memory pass alone takes no times and no errors."""
    metrics = measure_cell(a_cell("meft1"), Protocol(warmup=1, steps=1, passes=("memory",))).metrics

    assert "activation_peak_bytes" in metrics
    assert not {"step_time_s", "gradient_rel_max"} & set(metrics)


def test_a_memory_limit_ends_the_cell_as_oom():
    """With the phase it happened in."""
    with pytest.raises(CellFailure) as failure:
        measure_cell(a_cell("full", sequence_length=64), Protocol(memory_limit=2_000_000))

    assert "oom" == failure.value.status
    assert failure.value.detail["phase"] in ("forward", "backward", "optimizer")


def test_cuda_without_a_device_is_refused(monkeypatch):
    """Exit code 4, and what to do instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use --device counted") as error:
        measure_cell(a_cell("full", device="cuda"), QUICK)

    assert NOT_COMPARABLE == error.value.exit_code


def test_ones_own_model_is_measured():
    """meftbench.measure counts the steps of any model that returns a loss."""
    plain = meftbench.measure(a_model(layers=8, dtype=torch.float32), a_batch(8, 32))
    reversible = meftbench.measure(
        meftbench.apply_method(a_model(layers=8, dtype=torch.float32), "meft1", adapter_size=4), a_batch(8, 32)
    )

    assert reversible["activation_peak_bytes"].value < 0.4 * plain["activation_peak_bytes"].value
    assert "counted" == plain["activation_peak_bytes"].source
