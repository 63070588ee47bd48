"""Of which module of the model a buffer is: of parameters the owner, of others that in whose forward or backward it was
allocated."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meftbench.measuring.build import build_step
from meftbench.prediction.trace import count_uncomputed
from meftbench.probes.counted_metrics import count_memory, peak_buffers
from meftbench.probes.memory_counted import CountedStep
from meftbench.probes.modules_running import ModulesRunning, module_paths
from meftbench.probes.storage_counter import StorageCounter
from tests.models import a_cell_of

CPU = torch.device("cpu")
CELLS = [
    ("bert", "full"),
    ("bert", "lora+checkpoint"),
    ("bert", "meft1-exact"),
    ("llama", "full"),
    ("llama", "lora+checkpoint"),
    ("llama", "meft1-exact"),
    ("llama", "meft1-exact+chunked_loss"),
]


def observed(backbone, method, layers=3, **fields):
    """What a counter saw in the second step of a small model."""
    with CountedStep(build_step(a_cell_of(backbone, method, layers, **fields), CPU)) as counted:
        counted.run()
        return counted.run()


def by_module(buffers):
    """Bytes of buffers by their module."""
    sums = Counter()
    for size, _, origin in buffers:
        sums[origin.module] += size
    return sums


class Widths(nn.Module):
    """Layers of different widths, so that the sizes of tensors say in which of them they were made."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.head = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().sum()


def test_layers_that_repeat_share_a_path_and_others_keep_their_number():
    """Three kinds of modules in a row are not repeated layers."""
    model = Widths()

    paths = module_paths(model)

    assert "" == paths[id(model)]
    assert ["layers.*", "layers.*"] == [paths[id(layer)] for layer in model.layers]
    assert ["head.0", "head.1", "head.2"] == [paths[id(part)] for part in model.head]


def modules_of(counter, category):
    """Bytes alive now of a category, by module."""
    sums = Counter()
    for key, (_, size, of) in counter._storages.items():
        if of == category:
            sums[counter._origins[key].module] += size
    return sums


def test_buffers_of_forward_and_backward_are_of_the_module_one_can_work_out():
    """Of 32 rows: forward leaves the outputs of both layers, that of tanh, the last one of the head, which is squared,
    and the loss, of which the model makes one and the caller another; backward leaves the gradients of the weights."""
    model, x, counter = Widths(), torch.randn(32, 64), StorageCounter(block=1)
    for tensor in (*model.parameters(), x):
        counter.book(tensor, "parameters")
    counter.modules = ModulesRunning(model)
    row = 4 * 32
    with counter.modules, counter:
        counter.mark("forward")
        loss = model(x) * 2.0
        assert {"layers.*": 2 * row * 64, "head.1": row * 256, "head.2": row * 128, None: 4} == modules_of(
            counter, "activations"
        )
        counter.mark("backward")
        loss.backward()

    gradients = {"layers.*": 2 * 4 * (64 + 1) * 64, "head.0": 4 * (64 + 1) * 256, "head.2": 4 * (256 + 1) * 128}
    assert gradients == modules_of(counter, "temporaries")


@pytest.mark.parametrize(("backbone", "method"), CELLS)
def test_a_gradient_is_allocated_in_the_backward_of_the_module_that_owns_the_weight(monkeypatch, backbone, method):
    """Also where a checkpoint or a reversible stack runs the module again. Two things that are worked out independently
    of each other agree: who owns a weight, and whose backward ran when its gradient was allocated. A reversible stack
    copies the sum of a weight's gradients into the weight's precision, which is its own work."""
    found, book = [], StorageCounter.book

    def compared(counter, tensor, category, owner=None):
        if category == "gradients":
            origin = counter._origins[tensor.untyped_storage()._cdata]
            found.append((owner, origin.module, origin.op == "_to_copy.default"))
        book(counter, tensor, category, owner)

    monkeypatch.setattr(StorageCounter, "book", compared)
    observed(backbone, method)

    assert len(found) > 20
    assert set() == {(owner, module) for owner, module, is_copy in found if owner != module and not is_copy}
    copied = [(owner, module) for owner, module, is_copy in found if is_copy]
    assert all(module.endswith(".0") and owner.startswith(f"{module}.blocks.*.") for owner, module in copied)
    assert bool(copied) == method.startswith("meft")


METHODS = ["full", "lora", "houlsby", "meft1", "meft2-exact"]
LEVERS = ["", "+checkpoint", "+offload", "+tiled_mlp"]


@settings(max_examples=12)
@given(
    backbone=st.sampled_from(["bert", "llama", "bart"]),
    method=st.sampled_from(METHODS),
    lever=st.sampled_from(LEVERS),
    layers=st.integers(1, 4),
    micro=st.sampled_from([1, 4]),
)
def test_the_modules_hold_the_whole_peak(backbone, method, lever, layers, micro):
    """No byte is lost. All but the batch and a few numbers around the loss is of some module that the model has; what
    belongs to a parameter is of the module that owns it."""
    step = build_step(a_cell_of(backbone, f"{method}{lever}", layers, micro_batch_size=micro), CPU)
    paths = set(module_paths(step.model).values())
    with CountedStep(step) as counted:
        counted.run()
        seen = counted.run()

    on_device = [buffer for buffer in seen.buffers if buffer[1] != "host"]
    assert max(seen.phase_peaks["forward"], seen.phase_peaks["backward"]) == sum(by_module(on_device).values())
    assert {None} >= by_module(on_device).keys() - paths
    unowned = [(category, size) for size, category, origin in on_device if origin.module is None]
    assert set() == {category for category, _ in unowned} & {"parameters", "buffers", "gradients", "optimizer"}
    assert 4096 > sum(size for category, size in unowned if category != "inputs")


@pytest.mark.parametrize(("backbone", "method"), CELLS)
def test_what_a_layer_more_adds_is_in_the_modules_that_are_there_already(backbone, method):
    """Layers of every depth have the same modules, and each of these grows by the same bytes a layer."""
    held = [by_module(observed(backbone, method, layers).buffers) for layers in (3, 4, 5)]

    assert held[0].keys() == held[1].keys() == held[2].keys()
    assert all(held[2][module] - held[1][module] == held[1][module] - held[0][module] for module in held[0])


@pytest.mark.parametrize(("backbone", "method"), CELLS)
def test_a_trace_without_values_has_the_modules_of_the_counted_step(backbone, method):
    """Row for row and byte for byte."""
    cell = a_cell_of(backbone, method)
    counted = count_memory(build_step(cell, CPU), 1, 1)["peak_buffers"].value
    traced = peak_buffers([count_uncomputed(cell)]).value

    def shown(rows):
        return Counter((row["module"], row["category"], row["op"], row["bytes"], row["count"]) for row in rows)

    assert shown(counted) == shown(traced)


@pytest.mark.parametrize(("backbone", "method"), CELLS)
def test_to_know_the_modules_changes_no_number(monkeypatch, backbone, method):
    """Every metric is the same where nobody watches the modules; the list of buffers is the same but for them."""
    cell = a_cell_of(backbone, method)
    with_modules = count_memory(build_step(cell, CPU), 1, 2)
    monkeypatch.setattr(ModulesRunning, "__enter__", lambda self: None)
    monkeypatch.setattr("meftbench.probes.modules_running.owners", lambda model: {})
    without = count_memory(build_step(cell, CPU), 1, 2)

    rows = [metrics.pop("peak_buffers").value for metrics in (with_modules, without)]
    assert with_modules == without
    assert {None} == {row["module"] for row in rows[1]}
    assert None not in {row["module"] for row in rows[0] if row["category"] != "inputs"}
    sums = [Counter(), Counter()]
    for total, listed in zip(sums, rows, strict=True):
        for row in listed:
            total[row["category"], row["op"], row["dtype"], row["place"], *row["shape"]] += row["bytes"]
    assert sums[0] == sums[1]


class _Again(torch.autograd.Function):
    """Runs a module in forward without a graph, and in backward again, through which it then goes back."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module, ctx.x = module, x.detach()
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            y = ctx.module(x)
        return None, *torch.autograd.grad(y, x, gradient)


class _Told(torch.autograd.Function):
    """Passes on what it gets, and tells in backward which module is said to run."""

    @staticmethod
    def forward(ctx, tell, x):
        ctx.tell = tell
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.tell()
        return None, gradient


class _Tells(nn.Module):
    def __init__(self, told):
        super().__init__()
        self.told, self.modules_running = told, None

    def forward(self, x):
        self.told.append(self.modules_running.path())
        return _Told.apply(lambda: self.told.append(self.modules_running.path()), x)


class _Reversed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return _Again.apply(self.inner, x)


@pytest.mark.parametrize("in_thread", [False, True])
def test_backward_is_followed_in_a_thread_of_its_own(in_thread):
    """As that of a GPU is, where autograd begins to number the nodes anew: `again.inner` runs forward, runs again in
    backward after `last` went back, and goes back itself, before `first` does."""
    told = []
    model = nn.ModuleDict({"first": _Tells(told), "again": _Reversed(_Tells(told)), "last": _Tells(told)})
    running = ModulesRunning(model)
    for module in model.modules():
        module.modules_running = running
    x = torch.randn(3, requires_grad=True)
    with running:
        for part in model.values():
            x = part(x)
        loss = x.sum()
        if in_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        assert running.path() is None

    assert ["first", "again.inner", "last", "last", "again.inner", "again.inner", "first"] == told


def test_a_module_that_raises_does_not_run_any_more():
    """As one does that a checkpoint runs again only until it has what it needs."""

    class Raises(nn.Module):
        def forward(self, x):
            raise ValueError("stop")

    model = nn.Sequential(nn.Linear(2, 2), Raises())
    with ModulesRunning(model) as running:
        with pytest.raises(ValueError, match="stop"):
            model(torch.ones(2))
        assert running.path() is None
