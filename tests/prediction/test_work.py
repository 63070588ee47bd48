"""What a traced step does: operations and bytes of its operators, against torch's own counter and analytic numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from meftbench.catalogue.operations import Work, extrapolated
from meftbench.catalogue.profiles import find_profile
from meftbench.prediction.calibration import Counting, work_of
from meftbench.prediction.on_cpu import trace_on_cpu
from meftbench.prediction.predict import predict
from models import a_cell, a_cell_of, a_step

A100 = find_profile("a100-80gb")
EAGER = {"attention_requested": "eager"}  # torch's counter has no formula for the fused attention of a CPU


def on_gpu(cell):
    return predict(cell, A100).work


def counts_of(work, name):
    return sum(times for each, times in work.counts.items() if each.operator.name == name)


def recomputed_flops(work):
    return sum(each.operator.flops * times for each, times in work.counts.items() if each.recomputed)


# --- operations ---


class Formulas(TorchDispatchMode):
    """torch's formulas without its FlopCounterMode, which follows modules by hooks that torch.autograd.grad does not
    allow within a backward pass."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs or {}, out_val=result)
        return result


@pytest.mark.parametrize("method", ["meft2-exact", "bdia", "lora+tiled_mlp"])
def test_operations_of_a_pass_within_a_pass_are_those_of_the_real_step(method):
    step = a_step(method, **EAGER)
    step.run()  # the first chooses the steps of fixed-point streams by forward passes of its own
    with Formulas() as counter:
        step.run()

    assert counter.total == trace_on_cpu(a_cell(method, **EAGER)).work.flops


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "mezo"])
def test_operations_are_those_that_torch_counts_in_the_real_step(method):
    step = a_step(method, **EAGER)
    with FlopCounterMode(display=False) as counter:
        step.run()

    assert counter.get_total_flops() == trace_on_cpu(a_cell(method, **EAGER)).work.flops


def test_operations_of_a_full_step_are_three_times_those_of_its_forward():
    """Four projections and two of the feed-forward in each of four layers, scores and weighted values, pooler, head."""
    samples, length, hidden, inner, layers = 4, 16, 32, 64, 4
    tokens = samples * length
    layer = 2 * tokens * (4 * hidden**2 + 2 * hidden * inner) + 2 * 2 * samples * length**2 * hidden
    forward = layers * layer + 2 * samples * (hidden**2 + hidden * 2)

    assert 3 * forward == trace_on_cpu(a_cell("full", **EAGER)).work.flops


@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("lever", ["checkpoint", "tiled_mlp"])
def test_what_a_lever_runs_again_is_what_it_adds(backbone, lever):
    """All of it in the backward pass; without the lever nothing runs again."""
    plain, with_lever = (on_gpu(a_cell_of(backbone, method)) for method in ("lora", f"lora+{lever}"))

    assert 0 == recomputed_flops(plain) == plain.recomputed_flops_share
    assert with_lever.flops - plain.flops == recomputed_flops(with_lever) > 0
    assert {"backward"} == {each.phase for each in with_lever.counts if each.recomputed}


@pytest.mark.parametrize("method", ["meft1", "meft3-exact", "bdia"])
def test_a_reversible_method_runs_about_its_forward_again(method):
    """A third to a quarter of all operations: forward, forward again, gradients of hidden states."""
    assert 0.2 < on_gpu(a_cell_of("llama", method)).recomputed_flops_share < 0.4


def test_a_product_in_the_forward_of_a_function_that_runs_again_is_recomputed():
    """There gradients are not recorded, as in bitsandbytes' product with 4-bit weights."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, gradient):
            (w,) = ctx.saved_tensors
            return gradient @ w, None

    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    counting = Counting()
    with counting:
        y = torch.utils.checkpoint.checkpoint(Product.apply, x.exp(), w, use_reentrant=False)
        counting.counter.phase = "backward"
        y.sum().backward()
    products = {
        (each.phase, each.recomputed): each.operator.flops
        for each in counting.counter.work.counts
        if each.operator.flops
    }

    once = 2 * 4 * 8 * 16
    assert {("forward", False): once, ("backward", True): once, ("backward", False): once} == products


# --- bytes ---


def the_operator(run):
    ((operation, times),) = work_of(run).counts.items()
    assert 1 == times
    return operation.operator


def test_bytes_are_those_of_arguments_and_results():
    x, y = torch.zeros(10, 6), torch.zeros(10, 6)
    rows = torch.tensor([1, 2])

    added, added_in_place = the_operator(lambda: x + y), the_operator(lambda: x.add_(y))
    assert ("elementwise", 480, 240) == (added.kind, added.read, added.written)
    assert ("in place", 480, 240) == (added_in_place.kind, added_in_place.read, added_in_place.written)
    assert (240, 240) == the_operator(lambda: x.copy_(y))[5:7]
    assert (0, 240) == the_operator(lambda: torch.zeros_like(x))[5:7]
    assert (2 * 24 + 16, 2 * 24) == the_operator(lambda: torch.nn.functional.embedding(rows, x))[5:7]
    assert "permuted" == the_operator(lambda: x.t().contiguous()).kind
    assert {} == work_of(lambda: x.t().view(6, 10)[1:].expand(5, 10).detach()).counts


def test_an_expanded_tensor_is_read_as_often_as_it_is_in_memory():
    x = torch.zeros(1, 6)
    full = torch.zeros(10, 6)
    assert 24 + 240 == the_operator(lambda: x.expand(10, 6) + full).read


def test_an_operator_on_lists_counts_tensor_by_tensor():
    """A kernel for two lists takes 64 tensors at once."""
    first, second = [torch.zeros(3), torch.zeros(5)], [torch.zeros(3), torch.zeros(5)]

    work = work_of(lambda: torch._foreach_add_(first, second))

    assert {(24, 12, 1 / 64), (40, 20, 1 / 64)} == {each.operator[5:] for each in work.counts}


def test_what_goes_to_the_host_and_back_is_counted():
    """Gradients go down and weights come up: twice the trained bytes; what a lever of offloading counts itself."""
    cell = a_cell("lora+optimizer_offload")
    predicted = predict(cell, A100)
    trained = 4 * predicted.sizes["parameters_trainable"].value
    step = a_step("lora+offload", **EAGER)
    step.run()
    numbers = step.applied.levers["offload"].numbers()

    assert 2 * trained == predicted.work.host_transfer_bytes
    moved = numbers["offloaded_bytes"].value + numbers["returned_bytes"].value
    assert moved == trace_on_cpu(a_cell("lora+offload", **EAGER)).work.host_transfer_bytes


def test_kernels_that_are_no_operators_are_counted():
    """The fused coupling of the reversible engine: for each of two sublayers of a layer more, forward and backward; a
    stream and what is added are read, and the stream is written."""
    cell = a_cell_of("bert", "meft1-exact", layers=4, precision="bf16")
    shallower, work = on_gpu(a_cell_of("bert", "meft1-exact", precision="bf16")), on_gpu(cell)
    couplings = [each for each in work.counts if each.operator.name == "reversible coupling"]
    stream = 4 * cell.batch_size * cell.sequence_length * 32  # int32

    assert 2 * 2 == counts_of(work, "reversible coupling") - counts_of(shallower, "reversible coupling")
    assert all(each.operator.written >= stream and each.operator.read >= 1.5 * stream for each in couplings)


# --- multisets ---


@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft1-exact", "lora+offload"])
def test_work_of_a_deep_model_follows_from_two_shallow_ones(backbone, method):
    shallow, deeper, deep = (on_gpu(a_cell_of(backbone, method, layers=layers)) for layers in (3, 4, 7))

    told = extrapolated(shallow, deeper, 4)

    # A reversible stack makes one tensor with a number for each sublayer, an operator of another size at each depth.
    assert (deep.flops, deep.moved_bytes) == (told.flops, told.moved_bytes)
    assert deep.launches == pytest.approx(told.launches)
    different = {each.operator.name for each in deep.counts if deep.counts[each] != told.counts.get(each)}
    assert different <= {"zeros"}


def test_the_work_of_a_step_is_written_and_read_again():
    work = on_gpu(a_cell("lora+checkpoint"))

    assert work == Work.from_json(work.to_json())
    assert work.flops > 0


def test_a_later_step_makes_no_optimizer_states():
    """The first traced step makes them; a step of a training finds them."""
    names = {each.operator.name for each in on_gpu(a_cell("full")).counts if each.phase == "optimizer"}

    assert "zeros_like" not in names
    assert names
