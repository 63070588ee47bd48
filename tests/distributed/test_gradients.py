"""DDP and FSDP2 over gloo: two ranks have the gradients of one process with the samples of both."""

from __future__ import annotations

import pytest
from two_ranks import RANKS, a_cell, found_by_ranks

METHODS = {
    "bert-tiny@random": ("full", "lora", "meft1-exact", "meft2"),
    "llama-3.2-1b@random": ("full", "parallel", "meft1-exact", "lora+checkpoint"),
}
CASES = {
    f"{model.partition('-')[0]} {method} {way}": (model, method, way, {})
    for model, methods in METHODS.items()
    for method in methods
    for way in ("ddp", "fsdp2")
}
for way in ("ddp", "fsdp2"):
    CASES |= {
        f"llama full+chunked_loss {way}": ("llama-3.2-1b@random", "full+chunked_loss", way, {}),
        f"llama meft1-exact in micro-batches {way}": (
            *("llama-3.2-1b@random", "meft1-exact", way),
            {"micro_batch_size": 2},
        ),
        f"bert meft3-exact+checkpoint {way}": ("bert-tiny@random", "meft3-exact+checkpoint", way, {}),
    }


@pytest.fixture(scope="module")
def found():
    """By rank and case, in one start of both ranks."""
    return found_by_ranks(
        {
            case: (a_cell(model, method, way, **fields), a_cell(model, method, None))
            for case, (model, method, way, fields) in CASES.items()
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(found, case):
    """In float64; of exact reversal too, whose fixed-point steps the ranks agree on."""
    for rank in range(RANKS):
        assert found[rank][case][0] <= 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("fsdp2")])
def test_shards_are_smaller_than_the_whole(found, case):
    """Before a step a rank holds about half of the weights and of the optimizer's states; under DDP all of them."""
    before_a_step = [found[0][name][1][-1][0] for name in (case, case.replace("fsdp2", "ddp"))]

    assert before_a_step[0] < 0.65 * before_a_step[1]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_alike_after_the_second(found, case):
    """Nothing depends on when the thread that runs collectives lets go of their tensors."""
    for rank in range(RANKS):
        *_, third, fourth = found[rank][case][1]
        assert third == fourth
