"""`+compile`: what layers compute is compiled, reversal stays exact, graphs and graph breaks are reported."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import meftbench
from long_profile import sampled
from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.methods.levers import compiled
from meftbench.plan.protocol import Protocol
from tests.models import a_batch_for, a_cell, a_model, gradients, worst_relative_error


@pytest.fixture(autouse=True)
def eagerly(monkeypatch):
    """Graphs are traced, differentiated, and run by torch: inductor would take a compiler and a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    yield
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


REVERSIBLE = [(family, method) for family in ("bert", "llama", "bart") for method in ("meft1-exact", "meft3-exact")]


@pytest.mark.parametrize(("family", "method"), sampled(REVERSIBLE, 5))
def test_reversal_of_compiled_sublayers_is_exact(family, method):
    """Two sizes of tiles, strict: backward would raise if an element were not restored; gradients are eager ones."""
    model = a_model(3, torch.float32, backbone=family, dropout=0.0)
    settings = {"tiles": 5, "strict": True}
    eager = prepare(copy.deepcopy(model), method, settings, seed=1).model
    applied = prepare(model, method + "+compile", settings, seed=1)
    batch = a_batch_for(model)

    loss, found = gradients(applied.model, batch)
    expected_loss, expected = gradients(eager, batch)

    assert torch.allclose(loss, expected_loss, rtol=1e-6)
    assert worst_relative_error(found, expected) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    pickle.loads(pickle.dumps(applied.model))


@pytest.mark.parametrize("method", ["parallel", "meft1-exact"])
def test_a_budget_changes_what_is_saved_and_no_gradient(method):
    """A budget of 0 keeps the inputs of what is compiled: of a layer, the hidden state; of a reversible layer, what one
    tile of its token-wise work reads. The streams come back exactly, or strict reversal would raise."""
    model = a_model(2, torch.float64, dropout=0.0)
    settings = {"tiles": 2, "strict": True} if "meft" in method else {}
    eager = prepare(copy.deepcopy(model), method, settings, seed=1).model
    batch, saved, found = a_batch_for(model), {}, {}
    for budget in (0.0, 1.0):
        applied = prepare(copy.deepcopy(model), f"{method}+compile(budget={budget})", settings, seed=1).model
        saved[budget], resident = 0, {parameter.data_ptr() for parameter in applied.parameters()}

        def pack(tensor, budget=budget, resident=resident):
            saved[budget] += tensor.nbytes * (tensor.data_ptr() not in resident)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, found[budget] = gradients(applied, batch)

    _, expected = gradients(eager, batch)
    assert all(worst_relative_error(gradient, expected) <= 1e-12 for gradient in found.values())
    if method == "parallel":
        assert saved[0.0] < 0.5 * saved[1.0]
    pickle.loads(pickle.dumps(applied))


def test_a_cell_reports_graphs_and_breaks():
    """Time and fidelity of a compiled cell; its lever is seen to have engaged."""
    cell = a_cell("meft1-exact+compile")

    found = measure_cell(cell, Protocol(warmup=1, steps=1, passes=["throughput", "reconstruction"])).metrics

    assert found["compiled_graphs"].value > 0
    assert 0 == found["graph_breaks"].value
    assert 0 == found["mismatched_elements"].value


def test_counted_memory_is_refused():
    """A count would miss what compiled code allocates: one line says what to ask for."""
    with pytest.raises(UserError, match="allocates where the counter of a CPU does not see it; write passes"):
        measure_cell(a_cell("lora+compile"), Protocol(warmup=1, steps=1))


def test_unload_takes_it_off():
    """The layers of the pre-trained model are called as they were."""
    model = a_model(2, torch.float32)
    applied = prepare(model, "parallel+compile", seed=1)
    assert any(module._compiled_call_impl is not None for module in applied.model.modules())

    meftbench.unload(applied.model)

    assert all(module._compiled_call_impl is None for module in model.modules())
