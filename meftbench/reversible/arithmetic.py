"""How the streams are held between blocks.

A stream is (B, L, D): samples, positions, hidden size. The equations (coupling.py) are written in the operations
below, so another way to hold numbers is another class here and nothing else.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Arithmetic(Protocol):
    """The operations the couplings need, each exact or not as the implementation says."""

    name: str

    def lift(self, h_BLD: Tensor) -> Tensor:
        """A stream from a hidden state (floating point)."""
        ...

    def read(self, x_BLD: Tensor) -> Tensor:
        """The value of a stream in floating point; may be the stream itself."""
        ...

    def shrink(self, x_BLD: Tensor, factor: float) -> tuple[Tensor, Tensor | None]:
        """factor · x, and the side information that `grow` needs to undo it (None: none is kept)."""
        ...

    def grow(self, kept_BLD: Tensor, factor: float, side: Tensor | None) -> Tensor:
        """x of `shrink(x, factor)`."""
        ...

    def add(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        """x + value: a stream and a floating-point value."""
        ...

    def subtract(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        """x − value, the inverse of `add`."""
        ...


class Float:
    """Streams are floating point, as the paper has them: nothing is kept, and dividing by a factor f
    multiplies rounding errors by 1/f in every block (DESIGN 3.3)."""

    name = "float"

    def lift(self, h_BLD: Tensor) -> Tensor:
        return h_BLD

    def read(self, x_BLD: Tensor) -> Tensor:
        return x_BLD

    def shrink(self, x_BLD: Tensor, factor: float) -> tuple[Tensor, Tensor | None]:
        return (x_BLD if factor == 1.0 else x_BLD * factor), None

    def grow(self, kept_BLD: Tensor, factor: float, side: Tensor | None) -> Tensor:
        return kept_BLD if factor == 1.0 else kept_BLD / factor

    def add(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        # Autocast computes halves in lower precision than the streams are held in.
        return x_BLD + value_BLD.to(x_BLD.dtype)

    def subtract(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        return x_BLD - value_BLD.to(x_BLD.dtype)
