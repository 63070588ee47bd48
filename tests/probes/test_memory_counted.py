"""Counted bytes: against torch's MemTracker, analytic sizes, and themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from meftbench.backbones.build import build_model
from meftbench.errors import CellFailure
from meftbench.measuring.batch import resident_batch
from meftbench.measuring.step import Step
from meftbench.methods import prepare
from meftbench.probes.counted_metrics import count_memory, parameter_counts
from meftbench.probes.memory_counted import CountedStep
from meftbench.probes.storage_counter import CATEGORIES, StorageCounter
from tests.models import FOUR_LAYERS, METHODS, a_step

CPU = torch.device("cpu")


def full_step(name, overrides):
    model = build_model(name, overrides)
    applied = prepare(model, "full")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Step(applied, optimizer, resident_batch(model, 2, 32, CPU), 2, CPU)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("bert-tiny@random", {}),
        ("bert-mini@random", {"attention_probs_dropout_prob": 0.0}),
        ("roberta-base@random", FOUR_LAYERS | {"vocab_size": 500}),
    ],
)
def test_full_fine_tuning_equals_torchs_own_tracker_byte_for_byte(name, overrides):
    """Peak of two steps of full fine-tuning, without rounding: the same integer from MemTracker."""
    step = full_step(name, overrides)
    tracker = MemTracker()
    tracker.track_external(step.model, step.optimizer, *step.batch.values())
    with tracker:
        step.run()
        tracker.reset_mod_stats()  # else it refuses a second step
        step.run()
    expected = tracker.get_tracker_snapshot("peak")[CPU]["Total"]

    again = full_step(name, overrides)
    with CountedStep(again, block=1) as counted:
        found = max(counted.run().peak.total, counted.run().peak.total)

    assert expected == found


def test_an_mlp_has_the_size_one_can_work_out():
    """At the peak of a two-layer MLP: weights, one hidden activation, its gradient and the weight gradients."""
    counter = StorageCounter(block=1)
    first, second = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)
    x = torch.randn(32, 64)
    for tensor, category in ((first.weight, "parameters"), (second.weight, "parameters"), (x, "inputs")):
        counter.book(tensor, category)
    weights, stream, hidden = 4 * 2 * 64 * 256, 4 * 32 * 64, 4 * 32 * 256
    with counter:
        counter.mark("forward")
        h = torch.relu(first(x))  # relu keeps its output; the linear's output dies
        out = second(h)
        assert {"parameters": weights, "inputs": stream, "activations": hidden + stream} == {
            name: size for name, size in counter.live.items() if size
        }
        assert weights + stream + 2 * hidden == counter.phase_peaks["forward"]
        counter.mark("backward")
        out.backward(torch.zeros(32, 64))
        del out, h

    assert weights + stream + 4 * 2 * 64 * 256 == counter.total


@pytest.mark.parametrize("method", [*METHODS, "lora+checkpoint", "full+offload", "meft1+checkpoint"])
def test_a_cell_counted_twice_gives_identical_bytes_that_sum_to_the_peak(method):
    """Every metric is the same integer in a second run, and the breakdown sums to the peak."""
    first, second = (count_memory(a_step(method), warmup=1, steps=2) for _ in range(2))

    assert first == second
    breakdown = [first[f"{name}_bytes"].value for name in (*CATEGORIES, "workspace")]
    assert first["peak_allocated_bytes"].value == sum(breakdown)
    assert 0 == first["drift_bytes_per_step"].value
    assert first["activation_peak_bytes"].value > first["saved_bytes"].value > 0 or "offload" in method


def test_garbage_collection_does_not_change_the_peak():
    """Function contexts make no cycles that gc would free at a random moment."""
    import gc

    expected = count_memory(a_step("meft1"), warmup=1, steps=2)
    gc.disable()
    try:
        assert expected == count_memory(a_step("meft1"), warmup=1, steps=2)
    finally:
        gc.enable()


def test_the_first_step_lies():
    """Adam's state is made in the first step: later ones peak higher, so one warm-up step is always taken."""
    metrics = count_memory(a_step("full"), warmup=0, steps=1)

    assert metrics["peak_allocated_bytes"].value > metrics["first_step_peak_allocated_bytes"].value
    assert 2 * metrics["parameters_bytes"].value <= metrics["optimizer_bytes"].value


def test_checkpoints_are_held_instead_of_activations():
    """At the end of forward +checkpoint holds a fraction of what the plain method holds."""
    plain, checkpointed = (count_memory(a_step(m, sequence_length=64), 1, 1) for m in ("lora", "lora+checkpoint"))

    assert checkpointed["saved_bytes"].value < 0.2 * plain["saved_bytes"].value
    assert checkpointed["activation_peak_bytes"].value < 0.6 * plain["activation_peak_bytes"].value


def test_offloaded_bytes_are_the_hosts():
    """+offload moves what was held on the device to the host; both are counted, apart."""
    plain, offloaded = (count_memory(a_step(m, sequence_length=64), 1, 1) for m in ("lora", "lora+offload"))

    # What is left are the two tensors of which copies may still be under way, and those below 1024 bytes.
    assert offloaded["saved_bytes"].value < 0.02 * plain["saved_bytes"].value
    assert offloaded["host_pinned_peak_bytes"].value > 0.9 * plain["saved_bytes"].value
    assert plain["host_pinned_peak_bytes"].value == 0


def test_reversal_holds_the_same_at_any_depth():
    """Activation memory of meft1 does not grow with layers; that of checkpointing does, by one stream a layer."""

    def held(method, layers):
        overrides = FOUR_LAYERS | {"vocab_size": 120, "num_hidden_layers": layers}
        step = a_step(method, model_config_overrides=overrides, sequence_length=32)
        return count_memory(step, 1, 1)["saved_bytes"].value

    stream = 4 * 32 * 32 * 4  # samples × tokens × hidden × 4 bytes
    rng = 2 * 5120  # states of the CPU's generator, two sublayers a layer
    assert held("meft1", 12) - held("meft1", 4) <= 8 * rng
    assert 8 * stream <= held("lora+checkpoint", 12) - held("lora+checkpoint", 4)


def test_micro_batches_hold_less_at_the_same_batch():
    """Gradient accumulation shrinks every method's activations."""
    whole, accumulated = (count_memory(a_step("lora", sequence_length=64, micro_batch_size=m), 1, 1) for m in (4, 1))

    assert accumulated["activation_peak_bytes"].value < 0.4 * whole["activation_peak_bytes"].value


def test_more_than_the_limit_is_out_of_memory_with_the_bytes_asked_for():
    """A limit on counted bytes ends the step as a full device would."""
    with pytest.raises(CellFailure) as failure:
        count_memory(a_step("full"), 1, 1, limit=300_000)

    assert "oom" == failure.value.status
    assert failure.value.detail["requested_bytes"] > 0
    assert 300_000 == failure.value.detail["capacity_bytes"]


def test_resized_storages_and_views_are_counted_once():
    """A view costs nothing; a storage that grows in place costs its new size."""
    with StorageCounter(block=1) as counter:
        x = torch.zeros(100)
        y = x[:50].view(5, 10)
        assert 400 == counter.total
        x.resize_(200)
        x.zero_()
        assert 800 == counter.total
        del x
        assert 800 == counter.total
        del y

    assert 0 == counter.total


def test_sizes_are_rounded_to_the_allocators_blocks():
    """512 bytes at least, as the CUDA caching allocator hands them out."""
    with StorageCounter() as counter:
        x, y = torch.zeros(1), torch.zeros(129)

    assert 512 + 1024 == counter.total
    del x, y


def test_gradients_within_the_activation_peak_of_an_mlp():
    """The peak is in the backward of the activation function, where three hidden activations are alive: of the two
    weights the upper one has its gradient by then, the lower one not yet."""
    counter = StorageCounter(block=1)
    first, second = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)
    x = torch.randn(64, 64)
    for tensor in (first.weight, second.weight, x):
        counter.book(tensor, "parameters")
    for layer in (first, second):
        layer.weight.register_post_accumulate_grad_hook(lambda p: counter.arrived(p.grad))
    weight, hidden, stream = 4 * 256 * 64, 4 * 64 * 256, 4 * 64 * 64
    with counter:
        counter.mark("forward")
        counter.reset()
        level = counter.total
        out = second(torch.relu(first(x)))
        assert 0 == counter.gradients.bytes_at(counter.busiest_at)
        counter.mark("backward")
        out.backward(torch.zeros(64, 64))

    assert weight + 3 * hidden + 2 * stream == counter.busiest - level
    assert weight == counter.gradients.bytes_at(counter.busiest_at)
    assert 2 * weight == counter.gradients.bytes_at(counter.gradients.clock)


@pytest.mark.parametrize("method", ["meft1", "meft2", "meft1-exact", "meft3-exact"])
def test_a_reversible_stack_holds_its_gradients_at_the_peak(method):
    """It gives them back at its very end, so no parameter has one yet at the peak. They are the same at every length;
    what is left of the activation peak is proportional to tokens."""
    steps = [a_step(method, method_params={"adapter_size": 64}, sequence_length=length) for length in (16, 32, 64)]
    trained = parameter_counts(steps[0].model)["adapter_file_bytes"].value
    found = [count_memory(step, 1, 1) for step in steps]

    (gradients,) = {metrics["activation_gradients_bytes"].value for metrics in found}
    assert 0.5 * trained < gradients <= trained
    short, middle, long = (metrics["activation_peak_bytes"].value - gradients for metrics in found)
    assert 2 * (middle - short) == pytest.approx(long - middle, rel=0.02)
    assert 2 * short == pytest.approx(middle, rel=0.02)


def test_under_accumulation_the_gradients_of_the_last_micro_batch_are_there_beside_the_sum():
    """Those of the micro-batches before are in the parameters, those of this one still in the stack."""
    step = a_step("meft1", method_params={"adapter_size": 64}, micro_batch_size=1)
    trained = parameter_counts(step.model)["adapter_file_bytes"].value

    metrics = count_memory(step, 1, 1)

    assert 1.5 * trained < metrics["activation_gradients_bytes"].value < metrics["activation_peak_bytes"].value


def test_a_peak_before_backward_holds_no_gradients():
    """LoRA without checkpointing has all of its activations, and no gradient yet."""
    assert 0 == count_memory(a_step("lora"), 1, 1)["activation_gradients_bytes"].value
