"""The reversible couplings: the equations of DESIGN 3.1 and 3.2, their inverses and derivatives. Nothing else.

Shape suffixes: B samples, L positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from meftbench.reversible.arithmetic import Arithmetic


@dataclass(frozen=True)
class Coupling:
    """One half of a reversible block: replaces one stream x, reads the other, o.

        y = λ·(x − c) + f(o)           c = o if centred else 0
        x = (y − f(o)) / λ + c

    x, y, o: streams (B, L, D) as `arithmetic` holds them.  value: f(o), floating point (B, L, D).
    side: what the product with λ loses. Floating point: None, and the inverse multiplies rounding errors by 1/λ.
    Source: Liao, Tan, Monz (NeurIPS 2023), section 3; the centre is ours (DESIGN 3.2).
    """

    arithmetic: Arithmetic
    factor: float  # λ (or β)
    centred: bool = False

    def forward(self, x_BLD: Tensor, o_BLD: Tensor, value_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """y, and the side information for `inverse`."""
        kept_BLD, side = self.arithmetic.shrink(x_BLD - o_BLD if self.centred else x_BLD, self.factor)
        return self.arithmetic.add(kept_BLD, value_BLD), side

    def inverse(self, y_BLD: Tensor, o_BLD: Tensor, value_BLD: Tensor, side: Tensor | None) -> Tensor:
        """x."""
        kept_BLD = self.arithmetic.subtract(y_BLD, value_BLD)
        x_BLD = self.arithmetic.grow(kept_BLD, self.factor, side)
        return x_BLD + o_BLD if self.centred else x_BLD

    def gradient_of_x(self, dy_BLD: Tensor) -> Tensor:
        """∂y/∂x · dy = λ·dy."""
        return dy_BLD if self.factor == 1.0 else dy_BLD * self.factor

    def gradient_of_centre(self, dx_BLD: Tensor) -> Tensor | None:
        """What the centre adds to the gradient of o: −λ·dy = −dx; None without a centre."""
        return -dx_BLD if self.centred else None
