"""The fixed-point coupling in one kernel each way, for a tile: what coupling.py and arithmetic.py say, bit for bit.

In plain torch a tile takes up to sixty launches, most of them to pack and unpack side bits (docs/design.md 3). The
kernels are triton's. It is optional, and imported at the first tile that it could take; until then they are plain
functions.

A program holds ROWS rows of COLUMNS of the ⌈D/8⌉ columns of side bits. Column c of those has the bits of the elements
c + j·⌈D/8⌉ of the stream, j = 0 .. 7, in m bytes that also stand ⌈D/8⌉ columns apart (bits.py), so that every access
is to neighbouring columns and no program needs another's elements.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meftbench.reversible.kernels import taken

if TYPE_CHECKING:
    import triton.language as tl

VALUES = (torch.float32, torch.bfloat16, torch.float16)
# 512 places are 4 a thread: 16 bytes of a stream in one access.
ROWS, COLUMNS = 16, 32


def usable(x_TD: Tensor, value_TD: Tensor) -> bool:
    """Whether the kernels can take a tile: triton is there, and the tile on a device it compiles for.

    On a CPU only under triton's interpreter (TRITON_INTERPRET=1 before triton is imported), which is for tests.
    """
    if taken().fused_assumed:
        return True
    interpreted = x_TD.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (x_TD.is_cuda or interpreted)
        # A subclass may have no memory behind it (fake tensors), or not all of the elements.
        and type(x_TD) is type(value_TD) is Tensor
        and value_TD.dtype in VALUES
        and x_TD.dtype == torch.int32
        and value_TD.device == x_TD.device
        and value_TD.shape == x_TD.shape
        and x_TD.stride(-1) == 1
        and x_TD.numel() > 0
        and _loaded()
    )


def forward_(
    x_TD: Tensor,
    o_TD: Tensor | None,
    value_TD: Tensor,
    side: Tensor | None,
    *,
    m: int,
    scale: float | Tensor,
    watch: Tensor | None = None,
) -> None:
    """x becomes ((x − o) >> m) + round(value · scale), in place; only for tiles that are `usable`.

    x_TD, o_TD: int32; without o nothing is subtracted.
    scale: 2ᵏ, one for all channels or (D,), float32 and contiguous.
    side: room for the m low bits of x − o, (T, row_bytes(D, m)), uint8; None: they are not kept.
    watch: float32, no dimensions; raised to the largest |result|, taken in float32. NaN is the largest of all.
    """
    # The order of floating-point numbers that are not negative is that of their bits; NaNs come last.
    watch_bits = None if watch is None else watch.view(torch.int32)
    _launch(_forward, x_TD, o_TD, value_TD, side, m, scale, watch=watch_bits)


def inverse_(
    y_TD: Tensor, o_TD: Tensor | None, value_TD: Tensor, side: Tensor | None, *, m: int, scale: float | Tensor
) -> None:
    """The inverse of `forward_`, in place: y becomes x. side: what it wrote; may be None only if m is 0."""
    _launch(_inverse, y_TD, o_TD, value_TD, side, m, scale)


def _launch(
    kernel: Any,
    x_TD: Tensor,
    o_TD: Tensor | None,
    value_TD: Tensor,
    side: Tensor | None,
    m: int,
    scale: float | Tensor,
    **watch: Tensor | None,
) -> None:
    if taken().fused_assumed:
        return
    rows, columns = x_TD.shape
    by_channel, for_all = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    grid = (-(-rows // ROWS), -(-columns // (8 * COLUMNS)))
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(x_TD):
        kernel[grid](
            x_TD,
            o_TD,
            value_TD,
            side,
            by_channel,
            rows,
            x_TD.stride(0),
            *((0, 0) if o_TD is None else o_TD.stride()),
            *value_TD.stride(),
            0 if side is None else side.stride(0),
            **watch,
            D=columns,
            M=m,
            STEPS=for_all,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            enable_fp_fusion=False,  # torch rounds a product before it adds
        )
    # Autograd does not see what a kernel writes.
    torch.autograd.graph.increment_version(x_TD)


@functools.cache
def _loaded() -> bool:
    """Whether triton is installed. If so, the functions below are its kernels from here on."""
    try:
        import triton
        import triton.language
    except ImportError:
        return False
    here = globals()
    here["tl"] = triton.language
    for helper in (_rounded, _bits_of_plane, _plane_of_bits):
        here[helper.__name__] = triton.jit(helper)
    # Sizes of tiles differ by one, and places of the watch by four bytes: neither is worth a compilation.
    here["_forward"] = triton.jit(_forward, do_not_specialize=["T", "watch"])
    here["_inverse"] = triton.jit(_inverse, do_not_specialize=["T"])
    return True


def _forward(
    x: tl.tensor,
    o: tl.tensor,
    value: tl.tensor,
    side: tl.tensor,
    scale: tl.tensor,
    T: int,
    x_row: int,
    o_row: int,
    o_column: int,
    value_row: int,
    value_column: int,
    side_row: int,
    watch: tl.tensor,
    D: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    EIGHTH: tl.constexpr = (D + 7) // 8
    # A tile of 2³¹ elements is within reach.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    held = (row < T) & (column < EIGHTH)
    packed = tl.zeros((ROWS, COLUMNS), tl.int64)
    level = tl.zeros((ROWS, COLUMNS), tl.int32)
    for J in tl.static_range(8):
        place = column + J * EIGHTH
        inside = held & (place < D)
        kept = tl.load(x + row * x_row + place, mask=inside, other=0)
        if o is not None:
            kept -= tl.load(o + row * o_row + place * o_column, mask=inside, other=0)
        if side is not None:
            for K in tl.static_range(4):
                if M & (1 << K):
                    packed |= _plane_of_bits(kept, J, 1 << K, M >> (K + 1) << (K + 1))
        kept = kept >> M
        scaled = tl.load(value + row * value_row + place * value_column, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            scaled *= tl.load(scale + place, mask=place < D, other=1.0)
        else:
            scaled *= STEPS
        steps = _rounded(scaled)
        if watch is not None:
            # The sum once more in floating point, which does not wrap round at the end of the range.
            level = tl.maximum(level, (kept.to(tl.float32) + steps).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.store(x + row * x_row + place, kept + steps.to(tl.int32), mask=inside)
    if side is not None:
        for BYTE in tl.static_range(M):
            byte = (packed >> (8 * BYTE)) & 0xFF
            tl.store(side + row * side_row + column + BYTE * EIGHTH, byte.to(tl.uint8), mask=held)
    if watch is not None:
        tl.atomic_max(watch, tl.max(level), sem="relaxed")


def _inverse(
    x: tl.tensor,
    o: tl.tensor,
    value: tl.tensor,
    side: tl.tensor,
    scale: tl.tensor,
    T: int,
    x_row: int,
    o_row: int,
    o_column: int,
    value_row: int,
    value_column: int,
    side_row: int,
    D: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    EIGHTH: tl.constexpr = (D + 7) // 8
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    held = (row < T) & (column < EIGHTH)
    packed = tl.zeros((ROWS, COLUMNS), tl.int64)
    for BYTE in tl.static_range(M):
        byte = tl.load(side + row * side_row + column + BYTE * EIGHTH, mask=held, other=0)
        packed |= byte.to(tl.int64) << (8 * BYTE)
    for J in tl.static_range(8):
        place = column + J * EIGHTH
        inside = held & (place < D)
        kept = tl.load(x + row * x_row + place, mask=inside, other=0)
        scaled = tl.load(value + row * value_row + place * value_column, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            scaled *= tl.load(scale + place, mask=place < D, other=1.0)
        else:
            scaled *= STEPS
        steps = _rounded(scaled)
        kept = (kept - steps.to(tl.int32)) << M
        for K in tl.static_range(4):
            if M & (1 << K):
                kept |= _bits_of_plane(packed, J, 1 << K, M >> (K + 1) << (K + 1))
        if o is not None:
            kept += tl.load(o + row * o_row + place * o_column, mask=inside, other=0)
        tl.store(x + row * x_row + place, kept, mask=inside)


def _rounded(scaled: tl.tensor) -> tl.tensor:
    """float32, rounded half to even."""
    # From 2²³ on float32 has no fractions: adding it rounds them away, by the rule of every sum. The interpreter has
    # no function for it.
    whole = tl.where(scaled < 0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(scaled) < 8388608.0, (scaled + whole) - whole, scaled)


# A plane for each binary digit of m, the widest first (bits.PLANES). WIDTH: its bits an element; FIRST: how many wider
# planes have, which makes it the place both of the plane's bits in an element and of its bytes among the m.


def _plane_of_bits(element: tl.tensor, J: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr) -> tl.tensor:
    """A plane of element j, where it stands in the m bytes, as one integer with the first byte lowest."""
    field = (element >> FIRST) & ((1 << WIDTH) - 1)
    return field.to(tl.int64) << (8 * (FIRST + J % WIDTH) + J // WIDTH * WIDTH)


def _bits_of_plane(packed: tl.tensor, J: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr) -> tl.tensor:
    """The inverse of `_plane_of_bits`."""
    field = (packed >> (8 * (FIRST + J % WIDTH) + J // WIDTH * WIDTH)) & ((1 << WIDTH) - 1)
    return field.to(tl.int32) << FIRST
