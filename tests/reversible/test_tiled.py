"""Feed-forwards in tiles: the gradients of reference autograd; what is kept is the input."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from meftbench.methods import prepare
from meftbench.reversible.sublayers import tiles_of
from meftbench.reversible.tiled import Tiling
from tests.models import a_batch, a_model, gradients, worst_relative_error


@given(tokens=st.integers(1, 5000), asked=st.integers(1, 64))
@example(tokens=20, asked=8)
@example(tokens=5, asked=9)
def test_tiles_cover_all_tokens_once_and_are_of_one_size(tokens, asked):
    """All but the last, which is smaller; or by one, where the last would have no token. Never more than they need."""
    tiles = tiles_of(tokens, asked, 8, torch.device("cpu"))

    assert list(range(tokens)) == [t for rows in tiles for t in range(rows.start, rows.stop)]
    *sizes, last = (rows.stop - rows.start for rows in tiles)
    assert last <= min(sizes, default=last)
    assert len({*sizes}) <= 1 or max(sizes) - last == 1
    assert -(-tokens // len(tiles)) == max([*sizes, last])
    assert min(asked, tokens) == len(tiles)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (1024, 1), (4096, 1), (12288, 3), (10**6, 32)])
def test_auto_never_makes_tiles_too_small_to_be_fast(tokens, expected):
    """On a CPU tiles of at least 4,096 tokens, no more than 32."""
    assert expected == len(tiles_of(tokens, "auto", 768, torch.device("cpu")))


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("input_wanted", [True, False])
def test_gradients_are_those_of_reference_autograd(tiles, input_wanted):
    """Input and parameters, dropout repeated, the global random stream where it would have been."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 6)).double()
    results = []
    for recompute in (True, False):
        h = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        h.requires_grad_(input_wanted)
        module.zero_grad()
        torch.manual_seed(3)
        tiling = Tiling(tiles, recompute)
        (tiling.run(module, h, list(module.parameters())) ** 2).sum().backward()
        results.append([h.grad, *(p.grad.clone() for p in module.parameters()), torch.rand(3)])
        assert (tiles if recompute else 0) == tiling.recomputed

    for found, expected in zip(*results, strict=True):
        assert found is expected is None or torch.allclose(found, expected, atol=1e-12)


def test_a_frozen_feed_forward_passes_the_gradient_through():
    """Nothing trained inside: only the input has a gradient."""
    module = nn.Linear(4, 4).requires_grad_(False)
    h = torch.randn(1, 3, 4, requires_grad=True)
    Tiling(2).run(module, h, []).sum().backward()

    assert torch.allclose(module.weight.sum(0).expand(1, 3, 4), h.grad)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_feed_forward(duplicate):
    """The lever survives deepcopy and pickling, and the copy trains its own weights."""
    applied = prepare(a_model(2), "full+tiled_mlp", seed=1)
    copied = duplicate(applied.model)
    copied(**a_batch()).loss.backward()

    assert all(p.grad is None for p in applied.model.parameters())
    assert copied.bert.encoder.layer[1].intermediate.dense.weight.grad.abs().sum() > 0


def test_parameters_keep_their_names():
    """A checkpoint written without the lever loads with it."""
    plain, tiled = a_model(2).state_dict(), prepare(a_model(2), "full+tiled_mlp").model.state_dict()

    assert list(plain) == list(tiled)


def test_autocast_is_repeated_in_backward():
    """bf16 autocast: the gradients of the same tiles kept by autograd, to bf16's rounding."""
    applied = prepare(a_model(2, torch.float32), "full+tiled_mlp", seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = gradients(applied.model, a_batch())
    with applied.reference_autograd(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        _, expected = gradients(applied.model, a_batch())

    # The true gradient of a key's bias is zero: what is found there is rounding.
    seen = {name: g for name, g in expected.items() if not name.endswith("key.bias")}
    assert worst_relative_error({name: found[name] for name in seen}, seen) <= 0.05


def test_a_forward_without_backward_is_freed_without_the_garbage_collector():
    """No cycle holds the input of a reversible stack's forward pass; its graph is never kept."""
    model = prepare(a_model(2, torch.float32), "meft1-exact", {"tiles": 3}).model
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(o, torch.Tensor) and o.dtype == torch.int32 for o in gc.get_objects())
        loss = model(**a_batch()).loss
        del loss
        after = sum(isinstance(o, torch.Tensor) and o.dtype == torch.int32 for o in gc.get_objects())
    finally:
        gc.enable()

    assert before == after
