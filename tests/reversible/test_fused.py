"""The fused kernels give what plain torch gives, bit for bit: on CUDA, and elsewhere in triton's interpreter."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meftbench.reversible import Block, Coupling, FixedPoint, ReversibleStack, SubLayer, bits, fused
from meftbench.reversible.arithmetic import ChannelSteps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides when it is imported, for the whole process.
RUNS_HERE = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
needs_kernels = pytest.mark.skipif(
    not (INSTALLED and RUNS_HERE),
    reason="no CUDA: the interpreter runs it, see the last test" if INSTALLED else "triton is not installed",
)

STEP = 2.0**-16
LARGEST = 2**31 - 1


def a_tile(rows, columns, dtype=torch.float32, seed=0):
    """x and o of the whole range, and values of a few units."""
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randint(-LARGEST - 1, LARGEST, (2, rows, columns), dtype=torch.int32, generator=generator)
    value = 3 * torch.randn(rows, columns, generator=generator)
    return *streams.to(DEVICE), value.to(DEVICE, dtype)


def a_watch(level=0.0):
    return torch.tensor(level, device=DEVICE)


@contextmanager
def in_plain_torch():
    with patch.object(fused, "usable", return_value=False):
        yield


def both(coupling, x, o, value, **options):
    """(stream, side, watch) after the fused and after the plain forward pass."""
    found = []
    for plain in (False, True):
        y, watch = x.clone(), a_watch()
        if plain:
            with in_plain_torch():
                side = coupling.forward_(y, o, value, watch=watch, **options)
        else:
            assert fused.usable(y, value)
            side = coupling.forward_(y, o, value, watch=watch, **options)
        found.append((y, side, watch))
    return found


def assert_same(coupling, x, o, value):
    """Both give the same stream, side bits and watch, and both undo it."""
    (y, side, watch), (plain_y, plain_side, plain_watch) = both(coupling, x, o, value)
    assert torch.equal(plain_y, y)
    assert torch.equal(plain_watch, watch)
    assert (plain_side is None) == (side is None)
    assert side is None or torch.equal(plain_side, side)

    with in_plain_torch():
        coupling.inverse_(plain_y, o, value, side)
    coupling.inverse_(y, o, value, side)
    assert torch.equal(x, plain_y)
    assert torch.equal(x, y)


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 12), (2, 40)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("m", range(bits.MAX_BITS + 1))
def test_the_kernels_are_plain_torch_bit_for_bit(m, centred, rows, columns):
    """Stream, side bits and watch, also where columns are no multiple of eight and integers wrap round."""
    assert_same(Coupling(FixedPoint(), 2.0**-m, centred), *a_tile(rows, columns, seed=m))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_may_be_of_any_precision_that_is_trained_in(dtype):
    """Each is widened to float32 before it is scaled; other steps than the usual one scale otherwise."""
    for step_bits in (12, 16, 20):
        assert_same(Coupling(FixedPoint(step_bits), 1 / 8, True), *a_tile(3, 12, dtype))


@needs_kernels
@pytest.mark.parametrize("columns", [12, 37])
def test_a_step_for_each_channel(columns):
    """A vector of powers of two in place of one scale: the same integers, side bits and watch, and the way back."""
    steps = ChannelSteps(torch.arange(columns) % 9 + 8)
    assert_same(Coupling(FixedPoint(steps), 1 / 16, True), *a_tile(5, columns))


@needs_kernels
def test_a_tile_may_take_many_programs():
    """More rows than a program has, and more than eight times its columns."""
    rows, columns = 2 * fused.ROWS + 1, 8 * fused.COLUMNS + 11

    assert_same(Coupling(FixedPoint(), 2.0**-7, True), *a_tile(rows, columns))


@needs_kernels
def test_halves_are_rounded_to_even():
    """As torch rounds, on both sides of zero, and up to where float32 has no fractions left."""
    steps = [0.0, 0.49999997, 0.5, 1.5, 2.5, 3.5, 1e-30, 2.0**22 + 0.5, 2.0**22 + 1.5, 2.0**23 - 0.5, 2.0**23 - 1.5]
    steps += [2.0**23, 2.0**23 + 1, 2.0**24 + 2, 2.0**30 + 128, 2.0**31 - 128]
    value = STEP * torch.tensor([steps, [-step for step in steps]], device=DEVICE)
    x = torch.zeros_like(value, dtype=torch.int32)

    assert_same(Coupling(FixedPoint(), 1.0), x, x, value)
    assert_same(Coupling(FixedPoint(), 1 / 4), x + 7, x, value)


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 40_000.0])
def test_the_watch_sees_what_leaves_the_range(value):
    """NaN, infinity and what int32 cannot hold reach the watch as they are."""
    x, o, values = a_tile(3, 12)
    values[1, 7] = value

    (_, _, watch), (_, _, plain_watch) = both(Coupling(FixedPoint(), 1 / 8), x, o, values)

    assert torch.allclose(plain_watch, watch, rtol=0, atol=0, equal_nan=True)
    assert not watch < 2.0**31


@needs_kernels
def test_the_watch_is_only_ever_raised():
    """A level from another tile stays if it is higher; without a watch nothing is noted."""
    x = torch.full((1, 8), -5, dtype=torch.int32, device=DEVICE)
    value = torch.zeros(1, 8, device=DEVICE)
    for level, expected in ((0.0, 5.0), (7.0, 7.0)):
        watch = a_watch(level)
        Coupling(FixedPoint(), 1.0).forward_(x.clone(), x, value, watch=watch)
        assert expected == watch.item()
    Coupling(FixedPoint(), 1.0).forward_(x, x, value)

    assert -5 == x.max()


@needs_kernels
def test_nothing_is_put_aside_if_nothing_will_be_undone():
    """Without `keep` the same stream comes out, and no side bits."""
    (y, side, watch), (plain_y, _, plain_watch) = both(Coupling(FixedPoint(), 1 / 8, True), *a_tile(3, 12), keep=False)

    assert side is None
    assert torch.equal(plain_y, y)
    assert torch.equal(plain_watch, watch)


@needs_kernels
def test_only_the_tile_is_written():
    """Rows of a stream, values in any layout, and room for side bits among that of other tiles."""
    m, rows = 3, slice(2, 5)
    stream, other, _ = a_tile(7, 12)
    value = torch.randn(12, 3, device=DEVICE).T
    sides = torch.full((7, bits.row_bytes(12, m) + 1), 99, dtype=torch.uint8, device=DEVICE)
    expected = stream.clone()
    with in_plain_torch():
        expected_side = Coupling(FixedPoint(), 2.0**-m, True).forward_(expected[rows], other[rows], value)
    before, version = stream.clone(), stream._version
    options = {"m": m, "scale": 2.0**16}

    fused.forward_(stream[rows], other[rows], value, sides[rows, :-1], **options)

    assert torch.equal(expected, stream)
    assert torch.equal(expected_side, sides[rows, :-1])
    assert (sides[:2] == 99).all()
    assert (sides[5:] == 99).all()
    assert (sides[:, -1] == 99).all()
    assert stream._version > version  # or autograd would not notice a saved stream that was overwritten
    fused.inverse_(stream[rows], other[rows], value, sides[rows, :-1], **options)
    assert torch.equal(before, stream)


def _core(block, h_BLD, part, parts):
    return torch.tanh(block.first(h_BLD)).chunk(parts, -1)[part]


def _tokens(block, core_1TE, h_1TD):
    return block.second(torch.relu(h_1TD if core_1TE is None else core_1TE))


def a_stack(dtype, tiles):
    torch.manual_seed(0)
    width, exact = 12, FixedPoint()
    parts = [
        Block(
            {"first": nn.Linear(width, width), "second": nn.Linear(width, width)},
            SubLayer(_core, _tokens),
            SubLayer(None, _tokens),
        )
        for _ in range(2)
    ]
    couplings = (Coupling(exact, 1 / 8, True), Coupling(exact, 1 / 2))
    return ReversibleStack(parts, *couplings, swap=True, carrier=0, tiles=tiles, strict=True).to(DEVICE, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_trains_as_it_does_in_plain_torch(dtype):
    """Output and gradients are the same to the last bit, with one launch a tile each way."""
    tiles, results = 3, []
    stack = a_stack(dtype, tiles)
    h = torch.randn(2, 5, 12, device=DEVICE, dtype=dtype)

    def trained(stack):
        input_BLD = h.clone().requires_grad_()
        output_BLD = stack(input_BLD)
        output_BLD.square().sum().backward()
        results.append([output_BLD, input_BLD.grad, *(parameter.grad for parameter in stack.parameters())])

    with in_plain_torch():
        trained(copy.deepcopy(stack))
    with patch.object(fused, "_launch", wraps=fused._launch) as launch:
        trained(stack)

    assert 2 * 2 * tiles * len(stack.blocks) == launch.call_count
    assert all(torch.equal(plain, found) for plain, found in zip(*results, strict=True))
    assert results[0][1].abs().max() > 0


@needs_kernels
def test_tiles_that_the_kernels_cannot_take_are_left_to_torch():
    """float64 values, values to be broadcast, columns that are apart, no rows, and tensors without memory."""
    x, _, value = a_tile(3, 12)
    assert fused.usable(x, value)

    assert not fused.usable(x, value.double())
    assert not fused.usable(x, value[:1])
    assert not fused.usable(x.T, value.T)
    assert not fused.usable(x[:0], value[:0])
    with FakeTensorMode() as mode:
        assert not fused.usable(mode.from_tensor(x), mode.from_tensor(value))


def test_triton_is_optional():
    """Where it is missing the package is imported all the same, and tiles are left to torch."""
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from meftbench.reversible import fused
assert not fused.usable(torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, 8))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}

    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@needs_triton
@pytest.mark.skipif(RUNS_HERE, reason="the tests above have run")
def test_the_kernels_in_the_interpreter():
    """Without CUDA the tests above run in a process of their own, whose triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", __file__]

    ended = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert 0 == ended.returncode, ended.stdout + ended.stderr
    assert "passed" in ended.stdout
