"""The fixed-point coupling of a tile in one GPU kernel each way, with the results of arithmetic.py bit for bit.

In plain torch a tile takes many launches, with three side bits most of them to pack and unpack these (docs/design.md
3). The kernels are written in triton, which is optional and is imported at the first tile that it could take; until
then the kernels below are plain Python functions.

A program (triton's thread block) takes ROWS rows and COLUMNS of the ⌈D/8⌉ columns of side bits. Column c of those has
the bits of the elements c + j·⌈D/8⌉ of the stream, j = 0 .. 7, in m bytes that also stand ⌈D/8⌉ columns apart
(bits.py), so that all accesses are to neighbouring columns and no program needs the elements of another.
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
# 512 elements are 4 per thread: 16 bytes of a stream in one access.
ROWS, COLUMNS = 16, 32


def usable(x_TD: Tensor, value_TD: Tensor) -> bool:
    """Whether the kernels can take a tile: triton is installed, the tile is on a device that it compiles for, and has
    a dtype and layout that the kernels handle.

    On a CPU only under triton's interpreter (TRITON_INTERPRET=1 before triton is imported), which is for tests.
    """
    if taken().fused_assumed:
        return True
    interpreted = x_TD.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (x_TD.is_cuda or interpreted)
        # A subclass of Tensor may have no memory (fake tensors), or not all of the elements.
        and type(x_TD) is type(value_TD) is Tensor
        and value_TD.dtype in VALUES
        and x_TD.dtype == torch.int32
        and value_TD.device == x_TD.device
        and value_TD.shape == x_TD.shape
        and x_TD.stride(-1) == 1
        and x_TD.numel() > 0
        and _triton_loaded()
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

    x_TD, o_TD: int32; where o is None nothing is subtracted.
    scale: 2ᵏ, one for all channels or (D,), float32 and contiguous.
    side: receives the m low bits of x − o, (T, row_bytes(D, m)), uint8; None: they are not kept.
    watch: float32, no dimensions; raised to the largest |result|, computed in float32. NaN exceeds every number.
    """
    # Floating-point numbers that are not negative have the order of their bits read as integers; NaNs come last.
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
        if (assumed_run := taken().assumed_run) is not None:
            # Side bits are written in the forward pass, and read in the backward pass.
            sides: tuple[list[Tensor | None], list[Tensor | None]] = ([], [side])
            written, read = sides if kernel is _inverse else sides[::-1]
            assumed_run("reversible coupling", [x_TD, o_TD, value_TD, *read], [x_TD, *written])
        return
    rows, columns = x_TD.shape
    channel_scale, common_scale = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    grid = (-(-rows // ROWS), -(-columns // (8 * COLUMNS)))
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(x_TD):
        kernel[grid](
            x_TD,
            o_TD,
            value_TD,
            side,
            channel_scale,
            rows,
            x_TD.stride(0),
            *((0, 0) if o_TD is None else o_TD.stride()),
            *value_TD.stride(),
            0 if side is None else side.stride(0),
            **watch,
            D=columns,
            M=m,
            STEPS=common_scale,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            enable_fp_fusion=False,  # torch rounds a product before it adds
        )
    # Autograd does not see what a kernel writes, so the tensor's version is raised here.
    torch.autograd.graph.increment_version(x_TD)


@functools.cache
def _triton_loaded() -> bool:
    """Whether triton is installed. If so, the functions below are replaced by its kernels."""
    try:
        import triton
        import triton.language
    except ImportError:
        return False
    module_names = globals()
    module_names["tl"] = triton.language
    for helper in (_rounded, _bits_of_plane, _plane_of_bits):
        module_names[helper.__name__] = triton.jit(helper)
    # Sizes of tiles differ by one, and addresses of `watch` by four bytes: neither is worth another compilation.
    module_names["_forward"] = triton.jit(_forward, do_not_specialize=["T", "watch"])
    module_names["_inverse"] = triton.jit(_inverse, do_not_specialize=["T"])
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
    """The kernel of `forward_`. STEPS: the scale of all channels, where `scale` is None."""
    EIGHTH: tl.constexpr = (D + 7) // 8
    # A tile may have 2³¹ elements, too many for offsets of 32 bits.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    byte_mask = (row < T) & (column < EIGHTH)
    packed = tl.zeros((ROWS, COLUMNS), tl.int64)
    largest_bits = tl.zeros((ROWS, COLUMNS), tl.int32)
    for J in tl.static_range(8):
        place = column + J * EIGHTH
        element_mask = byte_mask & (place < D)
        element = tl.load(x + row * x_row + place, mask=element_mask, other=0)
        if o is not None:
            element -= tl.load(o + row * o_row + place * o_column, mask=element_mask, other=0)
        if side is not None:
            for K in tl.static_range(4):
                if M & (1 << K):
                    packed |= _plane_of_bits(element, J, 1 << K, M >> (K + 1) << (K + 1))
        element = element >> M
        scaled = tl.load(value + row * value_row + place * value_column, mask=element_mask, other=0.0).to(tl.float32)
        if scale is not None:
            scaled *= tl.load(scale + place, mask=place < D, other=1.0)
        else:
            scaled *= STEPS
        steps = _rounded(scaled)
        if watch is not None:
            # The sum is taken once more in floating point, which does not wrap around at the end of the range.
            largest_bits = tl.maximum(
                largest_bits, (element.to(tl.float32) + steps).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            )
        tl.store(x + row * x_row + place, element + steps.to(tl.int32), mask=element_mask)
    if side is not None:
        for BYTE in tl.static_range(M):
            byte = (packed >> (8 * BYTE)) & 0xFF
            tl.store(side + row * side_row + column + BYTE * EIGHTH, byte.to(tl.uint8), mask=byte_mask)
    if watch is not None:
        tl.atomic_max(watch, tl.max(largest_bits), sem="relaxed")


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
    """The kernel of `inverse_`."""
    EIGHTH: tl.constexpr = (D + 7) // 8
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    byte_mask = (row < T) & (column < EIGHTH)
    packed = tl.zeros((ROWS, COLUMNS), tl.int64)
    for BYTE in tl.static_range(M):
        byte = tl.load(side + row * side_row + column + BYTE * EIGHTH, mask=byte_mask, other=0)
        packed |= byte.to(tl.int64) << (8 * BYTE)
    for J in tl.static_range(8):
        place = column + J * EIGHTH
        element_mask = byte_mask & (place < D)
        element = tl.load(x + row * x_row + place, mask=element_mask, other=0)
        scaled = tl.load(value + row * value_row + place * value_column, mask=element_mask, other=0.0).to(tl.float32)
        if scale is not None:
            scaled *= tl.load(scale + place, mask=place < D, other=1.0)
        else:
            scaled *= STEPS
        steps = _rounded(scaled)
        element = (element - steps.to(tl.int32)) << M
        for K in tl.static_range(4):
            if M & (1 << K):
                element |= _bits_of_plane(packed, J, 1 << K, M >> (K + 1) << (K + 1))
        if o is not None:
            element += tl.load(o + row * o_row + place * o_column, mask=element_mask, other=0)
        tl.store(x + row * x_row + place, element, mask=element_mask)


def _rounded(scaled: tl.tensor) -> tl.tensor:
    """The float32 values rounded to integers, half to even."""
    # From 2²³ on float32 has no fractions, so that adding 2²³ rounds them away, half to even as in every sum. The
    # interpreter has no function for rounding.
    whole = tl.where(scaled < 0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(scaled) < 8388608.0, (scaled + whole) - whole, scaled)


# There is a plane for each binary digit of m that is set, the widest first (bits.PLANES). WIDTH: its bits per element.
# FIRST: the number of bits in wider planes, and so the position of the plane's bits in an element and of its bytes
# among the m bytes.


def _plane_of_bits(element: tl.tensor, J: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr) -> tl.tensor:
    """The bits of element j in a plane, at their position in the m bytes read as one integer, first byte lowest."""
    field = (element >> FIRST) & ((1 << WIDTH) - 1)
    return field.to(tl.int64) << (8 * (FIRST + J % WIDTH) + J // WIDTH * WIDTH)


def _bits_of_plane(packed: tl.tensor, J: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr) -> tl.tensor:
    """The inverse of `_plane_of_bits`."""
    field = (packed >> (8 * (FIRST + J % WIDTH) + J // WIDTH * WIDTH)) & ((1 << WIDTH) - 1)
    return field.to(tl.int32) << FIRST
