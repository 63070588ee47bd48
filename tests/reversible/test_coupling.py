"""The equations: inverse undoes forward, derivatives agree with autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meftbench.reversible import Coupling, FixedPoint, Float

factors = st.sampled_from([1.0, 0.5, 0.125, 0.1, 0.01, -1.0, -0.5])
# The weight of o in the difference that the factor multiplies: MEFT, MEFT with a centre, BDIA and midpoint.
centres = st.integers(0, 2)


def some_signs(drawn, rows, generator):
    """A sign for each row, or None."""
    return torch.randint(0, 2, (rows, 1), dtype=torch.int8, generator=generator) * 2 - 1 if drawn else None


@given(factor=factors, centre=centres, drawn=st.booleans(), seed=st.integers(0, 2**31))
def test_the_inverse_gives_the_stream_back(factor, centre, drawn, seed):
    """x = inverse(forward(x)) up to rounding, which one factor amplifies by 1/factor."""
    generator = torch.Generator().manual_seed(seed)
    x, other, value = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    coupling = Coupling(Float(), abs(factor) if drawn else factor, centre, drawn)
    signs = some_signs(drawn, 6, generator)
    stream = x.clone()

    side = coupling.forward_(stream, other, value, signs)
    coupling.inverse_(stream, other, value, side, signs)

    assert torch.allclose(x, stream, atol=1e-13 / abs(factor))


@given(
    m=st.integers(0, 8),
    step_bits=st.integers(1, 24),
    centre=centres,
    sign=st.sampled_from([1, -1, None]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_fixed_point_streams_come_back_bit_for_bit(m, step_bits, centre, sign, rows, columns, seed):
    """Whatever the factor, its sign (None: drawn), step, coupling and shape, and whatever integers the stream holds."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (
        torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32, generator=generator) for _ in range(2)
    )
    value = torch.randn(rows, columns, generator=generator)
    coupling = Coupling(FixedPoint(step_bits), 2.0**-m * (sign or 1), centre, drawn=sign is None)
    signs = some_signs(sign is None, rows, generator)
    stream = x.clone()

    side = coupling.forward_(stream, other, value, signs)
    coupling.inverse_(stream, other, value, side, signs)

    assert torch.equal(x, stream)
    assert (side is None) == (m == 0)


@given(
    m=st.integers(0, 8),
    step_bits=st.integers(4, 20),
    centre=centres,
    sign=st.sampled_from([1, -1, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_the_ordinary_form_has_the_very_same_values(m, step_bits, centre, sign, dtype, seed):
    """Integers in place and float64 under autograd are two ways to one number: the oracle of the gradient tests."""
    generator = torch.Generator().manual_seed(seed)
    h1, h2, value = (torch.randn(1, 3, 5, generator=generator).to(dtype) * 3 for _ in range(3))
    coupling = Coupling(FixedPoint(step_bits), 2.0**-m * (sign or 1), centre, drawn=sign is None)
    signs = some_signs(sign is None, 3, generator)
    numbers, arithmetic = coupling.arithmetic.reference, coupling.arithmetic
    x, other = arithmetic.lift(h1), arithmetic.lift(h2)

    coupling.forward_(x[0], other[0], value[0], signs)
    expected = coupling.reference(numbers.lifted(h1), numbers.lifted(h2), value, signs)

    assert torch.equal(expected, x.double() * arithmetic.unit(x.device))
    assert torch.equal(numbers.read(expected, dtype), arithmetic.read(x, dtype))


@given(factor=st.sampled_from([1.0, 0.5, 0.125, -1.0, -0.25]), centre=centres, drawn=st.booleans(), exact=st.booleans())
def test_the_derivatives_are_those_of_the_equation(factor, centre, drawn, exact):
    """gradient_ and value_gradient equal what autograd finds for y = a·(x − k·o) + c·value; rounding passes it on."""
    coupling = Coupling(FixedPoint() if exact else Float(), abs(factor) if drawn else factor, centre, drawn)
    numbers, signs = coupling.arithmetic.reference, some_signs(drawn, 6, torch.Generator().manual_seed(1))
    h, other, value = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y = coupling.reference(numbers.lifted(h), numbers.lifted(other), value, signs)
    dy = torch.randn_like(y)
    expected_x, expected_other, expected_value = torch.autograd.grad(y, [h, other, value], dy, allow_unused=True)

    of_value, of_other = coupling.value_gradient(dy, signs), torch.zeros_like(dy)
    of_x = dy.clone()
    coupling.gradient_(of_x, of_other, signs)

    assert torch.equal(expected_x, of_x)
    assert torch.equal(expected_value, of_value)
    assert (expected_other is None) == (centre == 0)
    assert torch.equal(torch.zeros_like(dy) if expected_other is None else expected_other, of_other)


@given(factor=factors, centre=st.integers(1, 2), drawn=st.booleans(), seed=st.integers(0, 2**31))
def test_a_sublayer_that_returns_what_it_reads_leaves_equal_streams_equal(factor, centre, drawn, seed):
    """With a centre: y is a·x + (1 − a)·o where f(o) = o, as in the published rules; with x = o it is o."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    signs = some_signs(drawn, 6, generator)
    factor = abs(factor) if drawn else factor
    coupling, a = Coupling(Float(), factor, centre, drawn), factor * (1 if signs is None else signs)

    assert torch.allclose(a * x + (1 - a) * other, coupling.reference(x, other, other, signs), atol=1e-12)
    assert torch.allclose(other, coupling.reference(other, other, other, signs), atol=1e-12)


@given(m=st.integers(0, 8), seed=st.integers(0, 2**31))
def test_in_evaluation_a_drawn_factor_is_zero(m, seed):
    """y is f(o), whatever x holds; there is no inverse, and nothing is put aside for one."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randint(-(2**31), 2**31, (3, 5), dtype=torch.int32, generator=generator) for _ in range(2))
    value = torch.randn(3, 5, generator=generator)
    coupling = Coupling(FixedPoint(), 2.0**-m, 2, drawn=True).in_mode(training=False)

    assert coupling.forward_(x, other, value) is None
    assert torch.equal(FixedPoint().lift(value), x)
    assert not coupling.reversible
    assert 0 == coupling.side_bytes(5)


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


def test_a_drawn_factor_is_positive():
    """Its sign would be drawn twice."""
    with pytest.raises(ValueError, match="where its sign is drawn, a factor is a positive number"):
        Coupling(FixedPoint(), -1 / 2, 2, drawn=True)


@pytest.mark.parametrize(("factor", "centre", "parts"), [(1.0, 0, 1), (1 / 16, 1, 2), (1 / 2, 2, 3), (1.0, 2, 4)])
def test_the_limit_leaves_room_for_what_is_computed(factor, centre, parts):
    """|x − k·o| and |c·f(o)| = |y − a·(x − k·o)| stay in the range where streams are below the limit."""
    assert 2.0**31 / parts == Coupling(FixedPoint(), factor, centre).limit


def test_the_largest_value_is_watched_where_integers_would_wrap():
    """The watch sees what the sum would have been, and NaN above everything."""
    fixed, watch = FixedPoint(), torch.zeros(())
    x = torch.full((1, 2), 2**31 - 10, dtype=torch.int32)

    fixed.add_(x, torch.tensor([[0.0, 1.0]]), watch)
    assert watch == pytest.approx(2.0**31 + 2**16, rel=1e-6)

    fixed.add_(x, torch.tensor([[0.0, float("nan")]]), watch)
    assert watch.isnan()
