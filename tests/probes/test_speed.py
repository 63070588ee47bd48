"""Throughput: what is counted as a token, and that phases add up."""

from __future__ import annotations

import pytest

from meftbench.measuring.build import build_step
from meftbench.probes.speed import quartiles, time_steps
from tests.models import a_cell, a_step


def test_phases_sum_to_the_step_and_tokens_leave_out_padding():
    """tokens/s · step time = tokens that are not padding; samples likewise."""
    import torch

    step = build_step(a_cell("lora"), torch.device("cpu"), padding=0.25)
    metrics = time_steps(step, warmup=1, steps=3)

    assert 4 * 12 == step.tokens
    assert step.tokens == pytest.approx(metrics["tokens_per_s"].value * metrics["step_time_s"].value)
    assert 4 == pytest.approx(metrics["samples_per_s"].value * metrics["step_time_s"].value)
    assert 3 == metrics["step_time_s"].n == len(metrics["step_time_s"].samples)


def test_one_step_of_each_micro_batch_is_timed():
    """Four micro-batches: forward is entered four times, the optimizer once."""
    marks = []
    step = a_step("lora", micro_batch_size=1)
    step.run(marks.append)

    assert [*["forward", "backward"] * 4, "optimizer", "end"] == marks


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """Losses are weighted by their share of the samples."""
    import torch

    overrides = a_cell().model_config_overrides | {"hidden_dropout_prob": 0.0}
    whole, parts = (
        a_step("lora", micro_batch_size=m, precision="fp64", model_config_overrides=overrides) for m in (4, 1)
    )
    for step in (whole, parts):
        step.forward_backward()

    for a, b in zip(whole.applied.trained().values(), parts.applied.trained().values(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-14)


def test_the_median_and_the_quartiles():
    """Value is the median, min and max are the quartiles; one sample is all three."""
    metric = quartiles([1.0, 2.0, 3.0, 4.0, 100.0])

    assert (3.0, 2.0, 4.0) == (metric.value, metric.min, metric.max)
    assert (7.0, 7.0, 7.0) == (quartiles([7.0]).value, quartiles([7.0]).min, quartiles([7.0]).max)
