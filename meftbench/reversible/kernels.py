"""Which kernels and tiles the engine takes: those for the device that tensors are on, or for another that is set here.

A prediction runs a step on the CPU whose allocations are to be those of a GPU, so it sets that GPU's kernels and tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kernels:
    """multiprocessors: of the GPU for which "auto" chooses tiles; None: for the device of the tensors.
    fused_assumed: the fused kernels (fused.py) count as usable for every tile but are not run: they work in place and
        in registers, so they would allocate nothing.
    assumed_run: called instead of each such kernel, with its name and the lists of tensors that it reads and writes
        (None in place of one that is not there); None: nothing is called.
    """

    multiprocessors: int | None = None
    fused_assumed: bool = False
    assumed_run: Callable[[str, list[Any], list[Any]], object] | None = None


_taken = Kernels()


def taken() -> Kernels:
    """The kernels that are set at present."""
    return _taken


@contextmanager
def as_on(kernels: Kernels) -> Iterator[None]:
    """Inside, the engine takes `kernels`, in all threads: autograd may run backward in one of its own."""
    global _taken  # a context variable would not be seen by autograd's threads
    previous, _taken = _taken, kernels
    try:
        yield
    finally:
        _taken = previous
