"""torch.compile takes what surrounds a stack; the stack itself runs as written, so that reversal stays exact."""

from __future__ import annotations

import pytest
import torch

from meftbench.methods import prepare
from tests.models import a_batch, a_model, worst_relative_error


def gradients_of(model, run, batch):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = run(**batch).loss
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize(
    ("backbone", "backend"),
    [("bert", "aot_eager"), ("gemma3", "eager")],  # Gemma calls its layers differently: the stack has relays
)
def test_a_compiled_model_has_the_same_gradients(backbone, backend):
    """Loss and gradients of torch.compile(model) are those of the model; `strict` finds every bit restored. The only
    breaks in the graph are the stack and its relays: nothing that is recomputed is compiled in the forward pass alone.
    """
    head = None if backbone == "bert" else "causal_lm"
    model = a_model(2, backbone=backbone, dropout=0.0, head=head)
    model = prepare(model, "meft1-exact", {"strict": True, "tiles": 3}, seed=1).model
    batch = a_batch() if backbone == "bert" else a_batch() | {"labels": a_batch()["input_ids"]}
    expected_loss, expected = gradients_of(model, model, batch)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    loss, found = gradients_of(model, torch.compile(model, backend=backend), batch)

    assert torch.allclose(expected_loss, loss, rtol=1e-9)
    assert worst_relative_error(found, expected) <= 1e-9
    assert {"Skip inlining `torch.compiler.disable()`d function"} == {
        why.splitlines()[0] for why in counters["graph_break"]
    }
    assert 2 <= counters["stats"]["unique_graphs"]
