"""The largest rank of several on a card that is not there: CUDA's rules, DDP and fully_shard as they are."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from two_ranks import LLAMA, SAMPLES, a_cell

from meftbench.catalogue.profiles import find_profile
from meftbench.prediction.estimate import estimate
from meftbench.prediction.predict import predict
from meftbench.prediction.tracer import Tracer

PROFILE = find_profile("a100-80gb", "test")


def between_steps(method, parallelism, **fields) -> int:
    """Bytes that are alive between steps, without the workspaces of cuBLAS."""
    cell = a_cell(LLAMA, method, parallelism, precision="fp32", **fields)
    last = predict(cell, PROFILE, warmup=2, steps=1).observed[-1]
    return last.baseline - last.peak.breakdown["workspace"]


@pytest.mark.parametrize("parallelism", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_later_steps_are_like_the_last_that_was_traced(parallelism):
    """As if all had been traced. No group is left when the trace is done."""
    cell = a_cell(LLAMA, "meft1-exact", parallelism, precision="fp32")
    few, all_steps = Tracer(PROFILE), Tracer(PROFILE)
    told = predict(cell, PROFILE, warmup=1, steps=3, tracer=few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meftbench.prediction.tracer.DISTRIBUTED_STEPS", 4)
        traced = predict(cell, PROFILE, warmup=1, steps=3, tracer=all_steps)

    assert traced.observed == told.observed
    assert traced.metrics()["peak_reserved_bytes"] == told.metrics()["peak_reserved_bytes"]
    assert not dist.is_initialized()


def test_buckets_are_as_large_as_the_gradients():
    """Between steps a rank of DDP holds what one process holds, and the buckets, as many bytes as trained weights."""
    cell = a_cell(LLAMA, "full", "ddp", precision="fp32")
    gradients = 4 * predict(cell, PROFILE).sizes["parameters_trainable"].value
    buckets = between_steps("full", "ddp") - between_steps("full", None, batch_size=SAMPLES, micro_batch_size=SAMPLES)

    assert gradients <= buckets < gradients + 4096


def test_frozen_weights_are_shared_out_too():
    """Between steps a rank of eight holds about an eighth of the whole; small tensors are rounded up to 512 bytes."""
    whole, shard = (between_steps("meft1-exact", way, world_size=8) for way in ("ddp", "fsdp2"))

    assert whole / 8 < shard < whole / 4


def test_the_time_of_a_step_is_not_predicted():
    """What ranks send each other is not known."""
    cell = a_cell(LLAMA, "lora", "fsdp2", precision="fp32")
    answer = estimate(
        {"cell": cell.model_dump(), "profile": "a100-80gb", "allocator": "", "versions": ""}, lambda line: None
    )

    assert answer["time"]["step_s"] is None
    assert "ranks" in answer["time"]["time_absent"]
    assert answer["fits"]
