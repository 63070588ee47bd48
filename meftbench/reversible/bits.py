"""Packing of side bits: the m low bits of each element that a shift of a stream would lose, m bits per element.

A row of D elements takes 8·⌈D/8⌉·m/8 bytes. m is cut into planes of 4, 2 and 1 bits (3 = 2 + 1). In a plane of p bits
a byte holds 8/p elements that stand ⌈D/8⌉·p columns apart, so that packing is a few shifts over contiguous columns.
The fused kernels (fused.py) write and read the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 8
# m -> widths in bits of its planes, that of the lowest bits first.
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip


def row_bytes(columns: int, m: int) -> int:
    """Bytes that the side bits of a row of `columns` elements take."""
    return -(-columns // 8) * m


def pack(low_TD: Tensor, m: int) -> Tensor:
    """The values 0 .. 2ᵐ−1 of low_TD (T, D), uint8, as bytes (T, row_bytes(D, m)), uint8."""
    rows, columns = low_TD.shape
    eighth = -(-columns // 8)
    if columns % 8:
        low_TD = torch.nn.functional.pad(low_TD, (0, 8 * eighth - columns))
    packed = low_TD.new_empty(rows, eighth * m)
    bit = start = 0
    for width in PLANES[m]:
        span = eighth * width  # number of this plane's bytes in a row, and distance of the elements in one byte
        target = packed[:, start : start + span]
        field = low_TD if width == m else (low_TD >> bit).bitwise_and_((1 << width) - 1)
        last_place = 8 // width - 1
        torch.bitwise_left_shift(field[:, last_place * span :][:, :span], last_place * width, out=target)
        for place in range(last_place):
            piece = field[:, place * span : (place + 1) * span]
            target.bitwise_or_(piece << (place * width) if place else piece)
        bit += width
        start += span
    return packed


def unpack(packed: Tensor, m: int, columns: int) -> Tensor:
    """The inverse of `pack`: values (T, columns), uint8."""
    eighth = -(-columns // 8)
    low_TD = packed.new_empty(packed.shape[0], 8 * eighth)
    bit = start = 0
    for width in PLANES[m]:
        span = eighth * width
        source, mask = packed[:, start : start + span], (1 << width) - 1
        for place in range(8 // width):
            target = low_TD[:, place * span : (place + 1) * span]
            if bit == 0:
                torch.bitwise_right_shift(source, place * width, out=target)
                target.bitwise_and_(mask)
            else:
                target.bitwise_or_((source >> (place * width)).bitwise_and_(mask).bitwise_left_shift_(bit))
        bit += width
        start += span
    return low_TD[:, :columns]
