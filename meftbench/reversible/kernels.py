"""Which kernels and tiles the engine takes: those of the device that tensors are on, or of another that is named.

A prediction runs a step with tensors on the CPU that are to allocate as on a GPU, so it names the GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """multiprocessors: of the GPU by which "auto" chooses tiles; None: by the device of the tensors.
    fused_assumed: the fused kernels (fused.py) take every tile and are not run: they work in place and in registers, so
        that they allocate nothing.
    """

    multiprocessors: int | None = None
    fused_assumed: bool = False


_taken = Kernels()


def taken() -> Kernels:
    """Those that hold now."""
    return _taken


@contextmanager
def as_on(kernels: Kernels) -> Iterator[None]:
    """Within it, the engine takes `kernels`, in whatever thread it runs: backward may have one of its own."""
    global _taken  # a context variable would not be seen by autograd's threads
    before, _taken = _taken, kernels
    try:
        yield
    finally:
        _taken = before
