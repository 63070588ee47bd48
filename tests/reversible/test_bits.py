"""Side bits: m bits an element, no more, and every one comes back."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from meftbench.reversible.bits import pack, row_bytes, unpack


@given(m=st.integers(1, 8), rows=st.integers(1, 6), columns=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_packing_loses_nothing(m, rows, columns, seed):
    """unpack(pack(x)) = x for all widths and shapes, also where 8 does not divide the columns."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(2**m, (rows, columns), dtype=torch.uint8, generator=generator)

    packed = pack(low, m)

    assert (rows, row_bytes(columns, m)) == packed.shape
    assert torch.equal(low, unpack(packed, m, columns))


def test_an_element_takes_m_bits():
    """768 columns at 3 bits are 288 bytes: 9.4 % of an fp32 row."""
    assert 768 * 3 // 8 == row_bytes(768, 3)


def test_packing_does_not_change_what_it_packs():
    """Narrow planes are written without shifting the source in place."""
    low = torch.arange(16, dtype=torch.uint8)[None] % 8
    before = low.clone()
    pack(low, 3)

    assert torch.equal(before, low)


class Operators(TorchDispatchMode):
    """Counts the operators that launch a kernel: views and allocations do not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


def test_the_operators_that_the_design_names():
    """docs/design.md 3: what packing and unpacking cost in plain torch."""
    counts = []
    for m in (4, 3):
        low = torch.zeros(2, 64, dtype=torch.uint8)
        with Operators() as packing:
            packed = pack(low, m)
        with Operators() as unpacking:
            unpack(packed, m, 64)
        counts += [packing.count, unpacking.count]
    page = " ".join((Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text("utf-8").split())

    assert "packing the default of four side bits takes {} operators and unpacking {};".format(*counts) in page
    assert "three bits, which do not divide a byte, take {} and {}.".format(*counts[2:]) in page
