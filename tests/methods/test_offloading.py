"""Levers that hold tensors on the host: what they move, what stays on the device, gradients, and what they refuse."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from meftbench.backbones.quantize import is_quantized
from meftbench.catalogue.levers import Offload
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import build_step
from meftbench.methods import apply_method, prepare
from meftbench.methods.levers.saved import given_back
from meftbench.plan.cell import Cell
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.levers import check_levers
from meftbench.probes.memory_counted import CountedStep
from tests.models import MEFTS, a_batch_for, a_cell, a_cell_of, a_model, a_step, gradients, worst_relative_error

CPU = torch.device("cpu")


@cache
def counted(method, backbone="llama", layers=4):
    """Metrics of a cell whose levers were seen to engage."""
    cell = a_cell_of(backbone, method, layers=layers)
    step = build_step(cell, CPU)
    return count_memory(step, 1, 1) | check_levers(step, cell)


def rounded(nbytes):
    return -(-nbytes // 512) * 512


def weights_of_layers(method, layers):
    """Bytes of the frozen weights of each layer, each weight rounded up to blocks of 512 bytes."""
    model = build_step(a_cell_of("llama", method, layers=layers), CPU).model
    kind = "blocks" if method.startswith("meft") else "layers"
    return [
        sum(rounded(p.nbytes) for n, p in model.named_parameters() if f"{kind}.{number}." in n and not p.requires_grad)
        for number in range(layers)
    ]


# --- offload ---


@pytest.mark.parametrize("method", ["full+checkpoint", "lora", "meft1-exact"])
@pytest.mark.parametrize("settings", ["what=checkpoints", "in_flight=1", "in_flight=5,minimum_bytes=4096"])
def test_settings_change_no_gradient(method, settings):
    """Of a decoder, dropout on: equal to those of reference autograd."""
    if method == "lora" and "checkpoints" in settings:
        method = "lora+checkpoint"
    applied = prepare(a_model(2, backbone="llama"), f"{method}+offload({settings})", seed=1)
    batch = a_batch_for(applied.model)

    with applied.around_forward():
        loss, found = gradients(applied.model, batch)
    with applied.reference_autograd():
        expected_loss, expected = gradients(applied.model, batch)

    assert torch.equal(expected_loss, loss)
    assert 1e-12 >= worst_relative_error(found, expected)


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_checkpoints_alone_are_one_input_a_layer(backbone):
    """Bytes moved are layers × samples × tokens × hidden × 4, and all but those in flight leave the device."""
    found = {n: counted(f"lora+checkpoint+offload(what=checkpoints,in_flight={n})", backbone) for n in (1, 3)}
    plain = counted("lora+checkpoint", backbone)
    stream = 4 * 64 * 32 * 4

    assert 4 * stream == found[1]["offloaded_bytes"].value == found[3]["offloaded_bytes"].value
    for in_flight, metrics in found.items():
        assert (4 - in_flight) * stream == plain["saved_bytes"].value - metrics["saved_bytes"].value
        assert (4 - in_flight) * stream == metrics["returned_bytes"].value
        assert 4 * stream == metrics["host_pinned_peak_bytes"].value


def test_every_saved_byte_is_moved_once():
    """Bytes moved are those of the distinct storages that autograd saves: torch's own hooks, without the lever."""
    cell = a_cell_of("llama", "lora", layers=4)
    step = build_step(cell, CPU)
    step.run()
    resident = {t.untyped_storage()._cdata for t in [*step.model.parameters(), *step.model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            saved[storage._cdata] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.forward_backward()

    expected = sum(storage.nbytes() for storage in saved.values() if storage.nbytes() >= 1024)
    moved = counted("lora+offload")["offloaded_bytes"].value
    assert expected == pytest.approx(moved, rel=0.02)  # of a view of less than half a storage, only the view is moved


def test_what_waits_to_be_copied_is_on_the_device():
    """The more copies may be in flight, the more is held after forward: all of it in the end, as if nothing moved."""
    saved = [counted(f"lora+offload(in_flight={n})")["saved_bytes"].value for n in (1, 8, 10_000)]
    plain = counted("lora")["saved_bytes"].value

    assert sorted(saved) == saved
    assert 0.1 * plain > saved[0]
    assert plain == pytest.approx(saved[-1], rel=0.02)


def test_side_information_leaves_block_by_block():
    """Of exact reversal: what a block needs to be reversed waits on the host while others run, so that nothing that is
    held after forward grows with depth."""

    def held(levers, layers):
        return count_memory(build_step(a_cell_of("llama", f"meft1-exact{levers}", layers=layers), CPU), 1, 1)[
            "saved_bytes"
        ].value

    side = 4 * 64 * 32 // 2  # samples × tokens × hidden × 4 bits, of the one sublayer with a factor of its own
    offload = "+offload(what=checkpoints)"

    assert 4 * side <= held("", 8) - held("", 4)
    assert 0 == held(offload, 8) - held(offload, 4)


def test_a_retained_graph_is_gone_through_twice():
    """Copies stay on the host as long as autograd may need them: of layers, and of a reversible stack's sides."""
    for method in ("lora+offload", "meft1-exact+offload"):
        applied = prepare(a_model(dropout=0.0), method, seed=1)
        batch = a_batch_for(applied.model)
        trained = list(applied.trained().values())
        with applied.around_forward():
            loss = applied.model(**batch).loss
        first = torch.autograd.grad(loss, trained, retain_graph=True)
        second = torch.autograd.grad(loss, trained)

        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, trained)
        assert not applied.levers["offload"]._host._copies


def test_a_forward_pass_that_is_dropped_leaves_nothing_behind():
    """Its buffers serve the next one."""
    step = a_step("lora+offload")
    step._forward(0)
    host = step.applied.levers["offload"]._host
    assert not host._copies
    assert not host._in_flight
    allocated = host.buffers.allocated
    step.run()
    assert allocated == host.buffers.allocated


def test_a_minimum_above_every_tensor_is_named():
    """Nothing is moved then."""
    cell = a_cell("lora+offload(minimum_bytes=100000000)")
    step = build_step(cell, CPU)
    step.run()

    with pytest.raises(CellFailure, match="offload: no byte was moved to the host"):
        check_levers(step, cell)


def test_without_the_lever_a_saved_tensor_is_itself():
    """What no lever holds is not wrapped."""
    tensor = torch.ones(2)
    assert given_back(tensor) is tensor


# --- weights ---


@pytest.mark.parametrize(
    ("method", "levers"),
    [
        *(
            (method, levers)
            for method in ("lora", "meft1-exact")
            for levers in ("", "+checkpoint+offload", "+tiled_mlp")
        ),
        ("parallel", "+checkpoint"),
        ("parallel", "+offload"),
        ("dora", ""),
        ("meft3", "+offload"),
    ],
)
def test_weights_on_the_host_change_no_gradient(method, levers):
    """Equal to those of the same method and levers with all weights on the device, in the second step as in the first;
    and at the end no weight of a layer is left on the device."""
    name = "bart" if method == "parallel" else "llama"
    offloaded, plain = (
        prepare(a_model(backbone=name), f"{method}{levers}{last}", seed=1) for last in ("+weight_offload", "")
    )
    batch = a_batch_for(plain.model)
    with plain.around_forward():
        expected_loss, expected = gradients(plain.model, batch)
    weights = offloaded.levers["weight_offload"]._weights
    for _ in range(2):
        with offloaded.around_forward():
            loss, found = gradients(offloaded.model, batch)

        assert torch.equal(expected_loss, loss)
        assert 1e-12 >= worst_relative_error(found, expected)
        assert 2 == weights.most_layers
        assert not weights._begun
        assert all(1 == slot.parameter.untyped_storage().nbytes() // slot.parameter.itemsize for slot in weights.slots)
    with offloaded.reference_autograd():
        reference = gradients(offloaded.model, batch)[1]
    assert (1e-6 if method in MEFTS else 1e-12) >= worst_relative_error(reference, expected)


@pytest.mark.parametrize(("method", "layers"), [("lora", 4), ("parallel+checkpoint", 7), ("meft1-exact", 4)])
def test_of_the_weights_two_layers_are_on_the_device(method, layers):
    """Analytic: between steps the weights of all layers are gone, and at the peak those of at most two are back."""
    weights = weights_of_layers(method, layers)
    plain, found = counted(method, layers=layers), counted(f"{method}+weight_offload", layers=layers)

    gone = plain["baseline_allocated_bytes"].value - found["baseline_allocated_bytes"].value
    placeholder = 512
    assert sum(weights) - placeholder == gone
    assert sum(weights) == found["host_pinned_peak_bytes"].value
    back = found["activation_peak_bytes"].value - plain["activation_peak_bytes"].value
    assert min(weights) <= back <= sum(sorted(weights)[-2:])
    # Forward brings all; the backward pass all but the last, which is there. (Bytes moved are not rounded up.)
    assert found["weights_moved_bytes"].value <= 2 * sum(weights) - weights[-1]


def test_the_next_layers_weights_are_under_way():
    """Forward 0, 1 | 2 | 3, backward 2 | 1 | 0: a layer is begun when the one before it in the pass computes."""
    applied = prepare(a_model(backbone="llama"), "lora+weight_offload", seed=1)
    weights, begun = applied.levers["weight_offload"]._weights, []
    bring, enter = weights._bring, weights.enter
    weights._bring = lambda number: (begun.append(number) if number not in weights._begun else None, bring(number))
    entered = []
    weights.enter = lambda number: (entered.append(number), begun.append("|"), enter(number))
    with applied.around_forward():
        loss = applied.model(**a_batch_for(applied.model)).loss
    loss.backward()

    assert [0, 1, 2, 3, 2, 1, 0] == [number for number in begun if number != "|"]
    first = begun.index(0)
    assert [0, 1, "|"] == begun[first : first + 3]


def test_weights_and_what_is_saved_are_both_held():
    """One context for both: a second one with hooks would be all that torch asks."""
    found = counted("lora+offload+weight_offload")
    alone = counted("lora+offload")

    assert alone["offloaded_bytes"].value == found["offloaded_bytes"].value
    assert 0 < found["weights_moved_bytes"].value
    assert found["peak_allocated_bytes"].value < alone["peak_allocated_bytes"].value


def test_moving_the_model_leaves_weights_on_the_host():
    """All of them together may not fit the device; order and names of parameters stay."""
    applied = prepare(a_model(), "lora+weight_offload", seed=1)
    names = [name for name, _ in applied.model.named_parameters()]
    applied.model.to("meta")

    on_host = {slot.parameter for slot in applied.levers["weight_offload"]._weights.slots}
    assert names == [name for name, _ in applied.model.named_parameters()]
    assert all((p in on_host) == (p.device.type == "cpu") for p in applied.model.parameters())


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("full+weight_offload", "full has no frozen weights to hold on the host; leave weight_offload out"),
        ("lora+weight_offload+compile", "which compiled code does not show; leave compile out"),
        ("lora+offload+compile", "which compiled code does not show; leave compile out"),
        ("lora+offload(what=checkpoints)", "there are no checkpoints to offload; add checkpoint, or write"),
        ("lora+weight_offload(layers=2)", "lever 'weight_offload' has no settings"),
        ("lora+offload(in_flight=0)", "in_flight"),
        ("lora+offload(what=some)", "what"),
    ],
)
def test_what_does_not_apply_is_one_line(method, line):
    """In `prepare`, as in a suite (tests/data/faulty_suites.txt)."""
    with pytest.raises(UserError) as error:
        prepare(a_model(2), method)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_for_your_own_script_has_no_such_levers():
    """They act around the forward pass."""
    with pytest.raises(UserError, match="weight_offload is not part of a model"):
        apply_method(a_model(2), "lora+weight_offload")


def test_weights_in_four_bits_are_refused():
    """bitsandbytes makes them when the model is moved to the device."""
    model = a_model(2)
    model.is_loaded_in_4bit = True
    assert is_quantized(model)
    with pytest.raises(UserError, match="weights in 4 bits, which bitsandbytes makes on the device"):
        prepare(model, "parallel+weight_offload")


def test_a_layer_whose_weights_all_train_is_refused():
    """Nothing is frozen inside of layers."""
    from meftbench.methods.levers.weight_offload import WeightOffload

    applied = prepare(a_model(2), "full")
    with pytest.raises(UserError, match="no layer has frozen weights"):
        WeightOffload().apply(applied)


def test_weights_that_never_moved_are_named():
    """The cell asks for it, the model does not do it."""
    step = a_step("lora")
    step.run()
    with pytest.raises(CellFailure, match="weight_offload: no weight was moved"):
        check_levers(step, a_cell("lora+weight_offload"))


def test_labels_say_what_is_set():
    """Written and read again."""
    cell = Cell.of("lora+offload(in_flight=3,what=all)+weight_offload", model="bert-tiny@random", batch_size=1,
                   sequence_length=8)  # fmt: skip
    assert Offload(in_flight=3) == cell.lever_settings()["offload"]
    assert "lora+offload(in_flight=3,what=all)+weight_offload" == cell.method_label


def test_a_step_counted_twice_holds_the_same():
    """Nothing is left on the device from one step to the next."""
    with CountedStep(a_step("lora+offload+weight_offload")) as step:
        first, second, third = (step.run() for _ in range(3))
    assert second == third
    assert first.baseline < second.baseline  # by the optimizer's state
    assert first.host_peak == second.host_peak
