"""+optimizer_in_backward and +optimizer_offload leave the plain optimizer's weights, with less memory on the device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import meftbench
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import build_step
from meftbench.methods import prepare
from meftbench.probes.levers import check_levers
from meftbench.probes.memory_counted import CountedStep
from tests.models import a_batch, a_cell, a_cell_of, a_model, a_step

NEEDS_IT = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantize)"
)
LEVERS = ["optimizer_in_backward", "optimizer_offload", "optimizer_offload+optimizer_in_backward"]
# Paged states are not offloaded once more, and where there are none nothing is (tests/measuring/test_optimizers.py).
PAIRS = [
    pytest.param(name, levers, marks=[NEEDS_IT] if entry.of_bitsandbytes else [])
    for name, entry in OPTIMIZERS.items()
    for levers in LEVERS
    if "offload" not in levers or (entry.keeps_state and not entry.paged)
]
# Weights of some MiB, and next to no activations.
HEAVY = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 1600, "num_hidden_layers": 3} | {
    "vocab_size": 1700,
    "attention_probs_dropout_prob": 0.0,
}
FEW = {"batch_size": 1, "sequence_length": 8, "model_config_overrides": HEAVY}


def after_steps(cell, steps=3):
    step = build_step(cell, torch.device("cpu"))
    torch.manual_seed(0)
    losses = [step.run() for _ in range(steps)]
    return losses, {name: parameter.detach() for name, parameter in step.applied.trained().items()}


@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact", "full+checkpoint"])
@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_weights_after_three_steps_are_the_plain_optimizers(backbone, method, levers):
    """In float64, an encoder and a decoder whose head is its embedding, every way that gradients arrive."""
    fields = {"precision": "fp64", "sequence_length": 16, "layers": 2}
    expected_losses, expected = after_steps(a_cell_of(backbone, method, **fields))

    losses, found = after_steps(a_cell_of(backbone, f"{method}+{levers}", **fields))

    assert losses == pytest.approx(expected_losses, rel=1e-12)
    for name, weight in expected.items():
        assert float((found[name] - weight).norm() / weight.norm()) <= 1e-12 or torch.equal(found[name], weight)


@pytest.mark.parametrize(("optimizer", "levers"), PAIRS)
def test_of_every_optimizer(optimizer, levers):
    """Bit for bit where a library runs one tensor after the other, as here."""
    fields = {"optimizer": optimizer, "model_config_overrides": HEAVY, "batch_size": 2}
    _, expected = after_steps(a_cell("full", **fields), 2)

    _, found = after_steps(a_cell(f"full+{levers}", **fields), 2)

    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


# --- memory ---


def counted(method, **fields):
    step = a_step(method, **(FEW | fields))
    with CountedStep(step) as observing:
        observing.run()
        return step, observing.run()


def test_no_two_gradients_are_alive_together():
    """Asked of the parameters themselves, at each gradient's arrival; afterwards none is left."""
    step = a_step("full+optimizer_in_backward", **FEW)
    trained, alive = list(step.applied.trained().values()), []
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in trained))
        )
    step.run()

    assert [1] * len(trained) == alive
    assert all(parameter.grad is None for parameter in trained)


def test_in_backward_saves_the_gradients_but_the_largest():
    """Of SGD, which takes no memory of its own: the peak is lower by the gradients that are not alive then."""
    plain, without = counted("full", optimizer="sgd")
    _, with_lever = counted("full+optimizer_in_backward", optimizer="sgd")

    sizes = [-(-parameter.nbytes // 512) * 512 for parameter in plain.applied.trained().values()]
    saved = without.peak.total - with_lever.peak.total
    assert sum(sizes) <= without.peak.total - without.baseline
    # What the plain step has at the end of backward, all gradients, against the largest and the activations there.
    assert sum(sizes) - max(sizes) - without.saved - max(sizes) <= saved <= sum(sizes)
    assert with_lever.peak.breakdown["gradients"] <= max(sizes)


@pytest.mark.parametrize("levers", ["+optimizer_offload", "+optimizer_offload+optimizer_in_backward"])
def test_offload_leaves_nothing_of_the_optimizer_on_the_device(levers):
    """8 bytes a weight with AdamW, and the temporaries of its step: all on the host, with a copy of the weights."""
    plain, without = counted("full")
    step, with_lever = counted(f"full{levers}")

    trained = list(plain.applied.trained().values())
    states = sum(2 * (-(-parameter.nbytes // 512) * 512) + 512 for parameter in trained)  # and the number of steps
    assert states == without.baseline - with_lever.baseline
    assert with_lever.phase_peaks["optimizer"] <= with_lever.phase_peaks["backward"]
    assert 0 == with_lever.peak.breakdown["optimizer"]
    assert with_lever.host_peak >= sum(3 * parameter.nbytes for parameter in trained)
    numbers = check_levers(step, a_cell(f"full{levers}", **FEW))
    assert sum(2 * parameter.nbytes + 4 for parameter in trained) == numbers["optimizer_host_bytes"].value


def test_weights_that_something_else_wrote_are_not_overwritten():
    """Loading a checkpoint between two steps: the copy on the host is made again."""
    plain, offloaded = a_step("full"), a_step("full+optimizer_offload")
    for step in (plain, offloaded):
        torch.manual_seed(0)
        step.run()
        with torch.no_grad():
            for parameter in step.applied.trained().values():
                parameter.add_(1e-2)
        step.run()

    for one, other in zip(plain.applied.trained().values(), offloaded.applied.trained().values(), strict=True):
        assert torch.equal(one, other)


# --- whether they engage ---


@pytest.mark.parametrize("lever", ["optimizer_in_backward", "optimizer_offload"])
def test_a_lever_that_is_missing_is_named(lever):
    step = a_step("full")
    step.run()

    with pytest.raises(CellFailure, match=f"{lever}: no "):
        check_levers(step, a_cell(f"full+{lever}"))


@pytest.mark.parametrize("method", ["lora", "meft1", "meft3-exact", "houlsby"])
@pytest.mark.parametrize("levers", LEVERS)
def test_they_engage_on_every_kind_of_method(method, levers):
    step = a_step(f"{method}+{levers}")
    step.run()

    assert 0 == check_levers(step, a_cell(f"{method}+{levers}"))["offloaded_bytes"].value


def test_gradients_are_left_where_they_are_read():
    """Passes that compare gradients call forward and backward alone, and the reference run is the plain step."""
    step = a_step("full+optimizer_in_backward")
    step.forward_backward()
    trained = list(step.applied.trained().values())
    assert all(parameter.grad is not None for parameter in trained)

    step.optimizer.zero_grad(set_to_none=True)
    with step.applied.reference_autograd(), step.applied.around_training_step():
        step.forward_backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_a_gradient_in_several_parts_is_refused():
    """A suite refuses micro-batches before; a step that is put together by hand is stopped in its second backward."""
    with pytest.raises(UserError, match="gets its gradient in several parts; leave the lever out"):
        a_step("full+optimizer_in_backward", micro_batch_size=2).run()


@pytest.mark.parametrize("lever", ["optimizer_in_backward", "optimizer_offload"])
def test_they_are_no_part_of_a_model(lever):
    with pytest.raises(UserError, match=f"{lever} is not part of a model; "):
        meftbench.apply_method(a_model(2), f"full+{lever}")


def test_a_model_of_ones_own_is_measured_with_them():
    """`measure` makes the optimizer itself."""
    plain = meftbench.measure(a_model(2, torch.float32), a_batch(), method="full")

    levers = "optimizer_offload+optimizer_in_backward"
    found = meftbench.measure(a_model(2, torch.float32), a_batch(), method=f"full+{levers}")

    assert found["baseline_allocated_bytes"].value < plain["baseline_allocated_bytes"].value
    assert 0 == found["optimizer_bytes"].value


def test_a_schedule_reaches_every_optimizer():
    """Learning rates are changed in `param_groups`, of which these optimizers have those of others."""
    step = a_step("full+optimizer_offload+optimizer_in_backward")
    before = [parameter.detach().clone() for parameter in step.applied.trained().values()]
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    step.run()

    assert all(map(torch.equal, before, step.applied.trained().values()))


def test_levers_know_nothing_before_a_step():
    applied = prepare(a_model(2), "full+optimizer_in_backward+optimizer_offload")

    assert ["optimizer_offload", "optimizer_in_backward"] == list(applied.levers)
    assert all(lever.missing(None) for lever in applied.levers.values())
