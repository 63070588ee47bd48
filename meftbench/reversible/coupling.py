"""The reversible couplings: the equations of docs/design.md 1 and 2, their inverses and their derivatives.

Shape suffixes: B samples, L positions, D hidden size; T tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from meftbench.reversible.arithmetic import Arithmetic


@dataclass(frozen=True)
class Coupling:
    """How the value of a sublayer (F or G of a block) replaces one stream, x, while the other, o, is only read.

        y = λ·(x − c) + f(o)           c = o if centred else 0
        x = (y − f(o)) / λ + c

    x, y, o: tiles (T, D) of streams as `arithmetic` holds them.  value: f(o), floating point (T, D).
    side: what the product with λ loses. Fixed point, λ = 2⁻ᵐ: m bits per element, and the inverse is exact.
        Floating point: None, and the inverse multiplies rounding errors by 1/λ.
    Source: Liao, Tan, Monz (NeurIPS 2023), section 3; the centre is this project's addition (docs/design.md 2).
    """

    arithmetic: Arithmetic
    factor: float  # λ (or β)
    centred: bool = False

    @property
    def limit(self) -> float | None:
        """Bound of |x| for a stream, in its units: below it, neither y nor x − c leaves the range."""
        limit = self.arithmetic.limit
        return limit / 2 if limit is not None and self.centred else limit

    def forward_(
        self, x_TD: Tensor, o_TD: Tensor, value_TD: Tensor, *, keep: bool = True, watch: Tensor | None = None
    ) -> Tensor | None:
        """x becomes y, in place. Returns the side information for `inverse_`; None if there is none, or not `keep`."""
        centre_TD = o_TD if self.centred else None
        return self.arithmetic.couple_(x_TD, centre_TD, value_TD, self.factor, keep, watch)

    def inverse_(self, y_TD: Tensor, o_TD: Tensor, value_TD: Tensor, side: Tensor | None) -> None:
        """y becomes x, in place."""
        centre_TD = o_TD if self.centred else None
        self.arithmetic.uncouple_(y_TD, centre_TD, value_TD, self.factor, side)

    def reference(self, x_BLD: Tensor, o_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        """y as a new tensor, for reference autograd; streams as `arithmetic.reference` holds them."""
        operations = self.arithmetic.reference
        return operations.added(operations.shrunk(x_BLD - o_BLD if self.centred else x_BLD, self.factor), value_BLD)

    def gradient_(self, dy_BLD: Tensor, do_BLD: Tensor) -> None:
        """dy becomes the gradient of x, ∂y/∂x · dy = λ·dy, in place; with a centre, −λ·dy is added to that of o."""
        if self.factor != 1.0:
            dy_BLD.mul_(self.factor)
        if self.centred:
            do_BLD.sub_(dy_BLD)
