"""The equations: inverse undoes forward, derivatives agree with autograd."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from meftbench.reversible import Coupling, Float

factors = st.sampled_from([1.0, 0.5, 0.125, 0.1, 0.01])


@given(factor=factors, centred=st.booleans(), seed=st.integers(0, 2**31))
def test_the_inverse_gives_the_stream_back(factor, centred, seed):
    """x = inverse(forward(x)) up to rounding, which one factor amplifies by 1/factor."""
    generator = torch.Generator().manual_seed(seed)
    x, other, value = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    coupling = Coupling(Float(), factor, centred)

    y, side = coupling.forward(x, other, value)

    assert torch.allclose(x, coupling.inverse(y, other, value, side), atol=1e-13 / factor)


@given(factor=factors, centred=st.booleans())
def test_the_derivatives_are_those_of_the_equation(factor, centred):
    """gradient_of_x and gradient_of_centre equal what autograd finds for y = factor * (x - c) + value."""
    x, other = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    coupling = Coupling(Float(), factor, centred)
    y, _ = coupling.forward(x, other, torch.zeros(2, 3, 5, dtype=torch.float64))
    dy = torch.randn_like(y)
    expected_x, expected_other = torch.autograd.grad(y, [x, other], dy, allow_unused=True)

    dx = coupling.gradient_of_x(dy)
    centre = coupling.gradient_of_centre(dx)

    assert torch.equal(expected_x, dx)
    assert (expected_other is None) == (centre is None)
    assert centre is None or torch.allclose(expected_other, centre)


def test_streams_keep_their_precision():
    """A half computed in lower precision, as under autocast, does not change the streams' dtype."""
    x = torch.ones(1, 1, 4)

    y, _ = Coupling(Float(), 0.1).forward(x, x, torch.ones(1, 1, 4, dtype=torch.bfloat16))

    assert torch.float32 == y.dtype
