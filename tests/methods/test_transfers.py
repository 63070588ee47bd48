"""Copies between device and host: their order on streams, the buffers they go through, how many are under way."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meftbench.catalogue.levers import Offload
from meftbench.methods.levers.offload import HostMemory
from meftbench.methods.levers.saved import SavedTensors
from meftbench.methods.levers.transfers import HostBuffers, OnStream

CPU = torch.device("cpu")


@dataclass
class FakeDevice:
    """In place of torch.cuda: streams that write down what is asked of them, in order."""

    log: list[tuple] = field(default_factory=list)
    entered: str = "compute"

    def current_stream(self, device):
        return FakeStream(self, self.entered)

    def Stream(self, device):
        return FakeStream(self, "beside")

    @contextmanager
    def stream(self, stream):
        before, self.entered = self.entered, stream.name
        yield
        self.entered = before


@dataclass
class FakeStream:
    device: FakeDevice
    name: str

    def wait_stream(self, other):
        self.device.log.append((self.name, "waits for", other.name))

    def record_event(self):
        self.device.log.append((self.name, "records"))
        return len(self.device.log)

    def wait_event(self, event):
        self.device.log.append((self.name, "waits for event", event))


@dataclass
class Target:
    """A tensor that is copied to."""

    device: FakeDevice

    def copy_(self, source, non_blocking):
        self.device.log.append((self.device.entered, "copies", "beside the host" if non_blocking else "with the host"))


def test_a_copy_waits_for_what_was_computed_and_computation_for_the_copy():
    """Wait, copy, record on the stream beside; then the computing stream waits for that very event."""
    device = FakeDevice()
    transfers = OnStream(CPU, device)

    begun = transfers.begin(Target(device), None)
    assert device.log == [
        ("beside", "waits for", "compute"),
        ("beside", "copies", "beside the host"),
        ("beside", "records"),
    ]
    transfers.wait(begun)
    assert ("compute", "waits for event", 3) == device.log[-1]


class Logged:
    """Transfers that copy at once, and write down which copies were waited for."""

    def __init__(self):
        self.begun, self.waited = [], []

    def begin(self, target, source):
        target.copy_(source)
        self.begun.append(source.numel())
        return len(self.begun) - 1

    def wait(self, number):
        self.waited.append(number)


def a_memory(**changes):
    memory = HostMemory(nn.Linear(1, 1), Offload(**({"minimum_bytes": 1} | changes)))
    memory._transfers = Logged()
    hooks = SavedTensors()
    hooks.keepers.append(memory)
    return memory, hooks


class Chain(torch.autograd.Function):
    """Doubles; saves a copy of what it reads, of another size each time."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.save_for_backward(torch.full((size,), float(size)))
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        assert (saved == len(saved)).all()
        return gradient * 2, None


def run_chain(hooks, sizes):
    x = torch.ones(1, requires_grad=True)
    with hooks():
        h = x
        for size in sizes:
            h = Chain.apply(h, size)
    h.sum().backward()
    assert 2.0 ** len(sizes) == x.grad.item()


@given(st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_in_flight_is_a_limit_both_ways(in_flight, layers):
    """Forward: a copy is waited for, and its source let go, once `in_flight` others have begun. Backward: those whose
    source is still there come without a copy; of the others, each is begun `in_flight` - 1 before it is needed."""
    memory, hooks = a_memory(in_flight=in_flight)
    sizes = [100 + number for number in range(layers)]
    held_at_once = []
    waited = memory._transfers.wait

    def noted(number):
        waited(number)
        held_at_once.append(sum(copy.leaving is not None for copy in memory._copies.values()))

    memory._transfers.wait = noted
    run_chain(hooks, sizes)

    log = memory._transfers
    assert sizes == log.begun[:layers]
    assert log.begun[layers:] == list(reversed(sizes[: max(0, layers - in_flight)]))
    assert sorted(log.waited) == list(range(len(log.begun)))  # each exactly once
    assert all(held <= in_flight + 1 for held in held_at_once)
    assert not memory._copies
    assert not memory._in_flight
    assert not memory._ahead


@pytest.mark.parametrize(("in_flight", "expected"), [(1, [0, 0]), (2, [0, 1]), (4, [0, 3])])
def test_the_next_storages_are_begun_before_they_are_needed(in_flight, expected):
    """While the fifth last of ten is read, the `in_flight` - 1 below it are on the device, and no others."""
    memory, hooks = a_memory(in_flight=in_flight)
    ahead = []
    on_device = memory.on_device

    def noted(saved):
        flat = on_device(saved)
        ahead.append(len(memory._ahead))
        return flat

    memory.on_device = noted
    run_chain(hooks, range(100, 110))

    assert expected == [ahead[-1], max(ahead)]


def test_buffers_are_used_again_by_the_next_step():
    """None is allocated anew from the second step on; those of a shape that is gone are dropped."""
    memory, hooks = a_memory()
    run_chain(hooks, [1000, 2000, 3000])
    allocated = memory.buffers.allocated
    run_chain(hooks, [3000, 2000, 1000])
    assert 3 == allocated == memory.buffers.allocated

    for _ in range(2):
        run_chain(hooks, [50])
    memory.begin()
    kept = [buffer for free in (memory.buffers._free, memory.buffers._unused) for size in free for buffer in free[size]]
    assert [512] == [buffer.numel() for buffer in kept]


def test_a_buffer_is_never_given_twice():
    """Until it is given back."""
    buffers = HostBuffers()
    first, second = (buffers.take(1000, CPU) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    buffers.give_back(first)
    assert first.data_ptr() == buffers.take(700, CPU).data_ptr()  # both take 1024 bytes


def test_a_storage_that_several_operations_save_is_copied_once_each_way():
    """Views of it and transposes too. `x` is read by three products with weights, one after the other."""
    weights = nn.ParameterList([torch.randn(16, 4) for _ in range(3)])
    memory, hooks = HostMemory(weights, Offload(minimum_bytes=1, in_flight=1)), SavedTensors()
    memory._transfers = Logged()
    hooks.keepers.append(memory)

    def value(leaf):
        x = leaf.exp()  # its result is saved here
        y = sum((x.view(2, 4, 16) @ w).sum() for w in weights) + x.t().square().sum()
        return y + (torch.full((300,), 2.0) * leaf.sum()).sum()  # displaces x from those in flight

    leaf = torch.randn(8, 16, requires_grad=True)
    with hooks():
        y = value(leaf)
    assert 1 == memory._transfers.begun.count(8 * 16)
    found = torch.autograd.grad(y, [leaf, *weights])

    assert 2 == memory._transfers.begun.count(8 * 16)
    for gradient, expected in zip(found, torch.autograd.grad(value(leaf), [leaf, *weights]), strict=True):
        assert torch.equal(expected, gradient)


def test_a_storage_that_is_written_between_two_uses_is_copied_twice():
    """By its version: the same memory holds other values."""
    memory, hooks = a_memory()
    x = torch.ones(4, requires_grad=True)
    buffer = torch.full((4,), 2.0)
    with hooks():
        first = x * buffer
        saved = list(memory._copies.values())
        buffer.add_(1)
        (first + x * buffer).sum()

    assert 1 == len(saved)
    assert [4, 4] == memory._transfers.begun


def test_of_a_small_view_only_the_view_is_copied():
    """The first token of each sample, as classifiers read it: not the whole storage."""
    memory, hooks = a_memory()
    h = torch.randn(4, 32, 8)
    weight = torch.randn(8, 2, requires_grad=True)
    with hooks():
        (h[:, 0] @ weight).sum().backward()

    assert [4 * 8] == memory._transfers.begun[:1]
    assert torch.allclose(weight.grad, h[:, 0].sum(0)[:, None].expand(8, 2))


def test_what_is_small_and_what_the_model_has_anyway_stays():
    """minimum_bytes counts the bytes that would be moved; parameters and buffers are on the device in any case."""
    model = nn.Linear(64, 64)
    memory = HostMemory(model, Offload(minimum_bytes=1024))
    hooks = SavedTensors()
    hooks.keepers.append(memory)
    with hooks():
        model(torch.randn(2, 64).requires_grad_()).mul(torch.ones(2, 64).expand(2, 64)).sum().backward()

    assert 0 == memory.moved_bytes
