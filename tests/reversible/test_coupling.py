"""The equations: inverse undoes forward, derivatives agree with autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meftbench.reversible import Coupling, FixedPoint, Float

factors = st.sampled_from([1.0, 0.5, 0.125, 0.1, 0.01])


@given(factor=factors, centred=st.booleans(), seed=st.integers(0, 2**31))
def test_the_inverse_gives_the_stream_back(factor, centred, seed):
    """x = inverse(forward(x)) up to rounding, which one factor amplifies by 1/factor."""
    generator = torch.Generator().manual_seed(seed)
    x, other, value = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    coupling = Coupling(Float(), factor, centred)
    stream = x.clone()

    side = coupling.forward_(stream, other, value)
    coupling.inverse_(stream, other, value, side)

    assert torch.allclose(x, stream, atol=1e-13 / factor)


@given(
    m=st.integers(0, 8),
    step_bits=st.integers(1, 24),
    centred=st.booleans(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_fixed_point_streams_come_back_bit_for_bit(m, step_bits, centred, rows, columns, seed):
    """Whatever the factor, step, coupling and shape, and whatever integers the stream holds."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (
        torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32, generator=generator) for _ in range(2)
    )
    value = torch.randn(rows, columns, generator=generator)
    coupling = Coupling(FixedPoint(step_bits), 2.0**-m, centred)
    stream = x.clone()

    side = coupling.forward_(stream, other, value)
    coupling.inverse_(stream, other, value, side)

    assert torch.equal(x, stream)
    assert (side is None) == (m == 0)


@given(
    m=st.integers(0, 8),
    step_bits=st.integers(4, 20),
    centred=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_the_ordinary_form_has_the_very_same_values(m, step_bits, centred, dtype, seed):
    """Integers in place and float64 under autograd are two ways to one number: the oracle of the gradient tests."""
    generator = torch.Generator().manual_seed(seed)
    h1, h2, value = (torch.randn(1, 3, 5, generator=generator).to(dtype) * 3 for _ in range(3))
    coupling = Coupling(FixedPoint(step_bits), 2.0**-m, centred)
    numbers, arithmetic = coupling.arithmetic.reference, coupling.arithmetic
    x, other = arithmetic.lift(h1), arithmetic.lift(h2)

    coupling.forward_(x[0], other[0], value[0])
    expected = coupling.reference(numbers.lifted(h1), numbers.lifted(h2), value)

    assert torch.equal(expected, x.double() * arithmetic.unit(x.device))
    assert torch.equal(numbers.read(expected, dtype), arithmetic.read(x, dtype))


@given(factor=st.sampled_from([1.0, 0.5, 0.125]), centred=st.booleans(), exact=st.booleans())
def test_the_derivatives_are_those_of_the_equation(factor, centred, exact):
    """gradient_ equals what autograd finds for y = factor * (x - c) + value; rounding passes it straight through."""
    coupling = Coupling(FixedPoint() if exact else Float(), factor, centred)
    numbers = coupling.arithmetic.reference
    h, other = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = coupling.reference(numbers.lifted(h), numbers.lifted(other), torch.zeros(2, 3, 5, dtype=torch.float64))
    dy = torch.randn_like(y)
    expected_x, expected_other = torch.autograd.grad(y, [h, other], dy, allow_unused=True)

    of_other = torch.zeros_like(dy)
    coupling.gradient_(dy, of_other)

    assert torch.equal(expected_x, dy)
    assert (expected_other is None) == (not centred)
    assert torch.equal(torch.zeros_like(dy) if expected_other is None else expected_other, of_other)


def test_streams_keep_their_precision():
    """A half computed in lower precision, as under autocast, does not change the streams' dtype."""
    x = torch.ones(1, 4)

    Coupling(Float(), 0.1).forward_(x, x.clone(), torch.ones(1, 4, dtype=torch.bfloat16))

    assert torch.float32 == x.dtype
    assert torch.allclose(torch.full((1, 4), 1.1), x)


@pytest.mark.parametrize("factor", [0.1, 2.0, 1 / 512, 0.75])
def test_a_factor_that_cannot_be_undone_is_refused(factor):
    """Exact reversal knows powers of two from 1 to 1/256."""
    with pytest.raises(ValueError, match="exact reversal needs"):
        FixedPoint().side_bytes(8, factor)


def test_the_largest_value_is_watched_where_integers_would_wrap():
    """The watch sees what the sum would have been, and NaN above everything."""
    fixed, watch = FixedPoint(), torch.zeros(())
    x = torch.full((1, 2), 2**31 - 10, dtype=torch.int32)

    fixed.add_(x, torch.tensor([[0.0, 1.0]]), watch)
    assert watch == pytest.approx(2.0**31 + 2**16, rel=1e-6)

    fixed.add_(x, torch.tensor([[0.0, float("nan")]]), watch)
    assert watch.isnan()
