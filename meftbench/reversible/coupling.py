"""The reversible couplings: the equations of docs/design.md 1 to 3, their inverses and their derivatives.

Shape suffixes: B samples, L positions, D hidden size; T tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from meftbench.reversible.arithmetic import Arithmetic
from meftbench.reversible.weights import Weights, weighted


@dataclass(frozen=True)
class Coupling:
    """How the value of a sublayer (F or G of a block) replaces one stream, x, while the other, o, is only read.

        y = a·(x − k·o) + c·f(o)           c = 1 + (k − 1)·a if k > 0 else 1
        x = (y − c·f(o)) / a + k·o

    With a centre (k > 0), c is such that a sublayer which returns what it reads moves y to a·x + (1 − a)·o, so that
    equal streams stay as they are. The couplings that are in use, with h(o) = f(o) − o:

        a = λ, k = 0        λ·x + f(o)                            MEFT (Liao, Tan, Monz, NeurIPS 2023, section 3)
        a = λ, k = 1        λ·(x − o) + f(o)                      MEFT with a centre (docs/design.md 2)
        a = ±1/2, k = 2     a·x + (1 − a)·o + (1 + a)·h(o)        BDIA (Zhang, Lewis, Kleijn, arXiv:2407.09093), a = γ
        a = 1, k = 2        x + 2·h(o)                            midpoint (Gal et al., arXiv:2512.02056, eq. 2.4)
        a = −1, k = 1       2·o − x + h(o)                        leapfrog (ibid., eq. 2.6)

    x, y, o: tiles (T, D) of streams as `arithmetic` holds them.  value: f(o), floating point (T, D).
    factor: a.  centre: k.
    drawn: in training the sign of a is drawn for each sample and block; in evaluation a is 0 (`in_mode`).
    signs: +1 or −1 for each token, (T, 1), int8, by which a is multiplied; None: +1 for all.
    side: what the product with a loses. Fixed point, |a| = 2⁻ᵐ: m bits per element, and the inverse is exact.
        Floating point: None, and the inverse multiplies rounding errors by 1/|a|.
    Raises ValueError: a factor that is not positive although its sign is drawn.
    """

    arithmetic: Arithmetic
    factor: float
    centre: int = 0
    drawn: bool = False

    def __post_init__(self) -> None:
        if self.drawn and self.factor <= 0:
            raise ValueError(f"factor {self.factor}: where its sign is drawn, a factor is a positive number")

    def in_mode(self, training: bool) -> Coupling:
        """The coupling in training or in evaluation: a factor whose sign is drawn is 0, its mean, in evaluation."""
        return replace(self, factor=0.0, drawn=False) if self.drawn and not training else self

    @property
    def reversible(self) -> bool:
        """Whether there is an inverse: not for a factor of 0, with which y is f(o)."""
        return self.factor != 0.0

    @property
    def limit(self) -> float | None:
        """Bound of |x| for a stream, in its units: below it, neither y, x − k·o nor c·f(o) leaves the range."""
        limit = self.arithmetic.limit
        if limit is None:
            return None
        apart = 1 + self.centre  # |x − k·o| in units of the bound
        # c·f(o) is y − a·(x − k·o). Where c is 1, f(o) is about as large as y.
        return limit / (apart if self.centre < 2 else max(apart, 1 + abs(self.factor) * apart))

    def side_bytes(self, columns: int) -> int:
        """Bytes of side information per token of `columns` elements. Raises ValueError: a factor without an inverse."""
        return self.arithmetic.side_bytes(columns, abs(self.factor)) if self.reversible else 0

    def forward_(
        self,
        x_TD: Tensor,
        o_TD: Tensor,
        value_TD: Tensor,
        signs_T1: Tensor | None = None,
        *,
        keep: bool = True,
        watch: Tensor | None = None,
    ) -> Tensor | None:
        """x becomes y, in place. Returns the side information for `inverse_`; None if there is none, or not `keep`."""
        return self.arithmetic.couple_(x_TD, o_TD, value_TD, self._weights(signs_T1), keep, watch)

    def inverse_(
        self, y_TD: Tensor, o_TD: Tensor, value_TD: Tensor, side: Tensor | None, signs_T1: Tensor | None = None
    ) -> None:
        """y becomes x, in place."""
        self.arithmetic.uncouple_(y_TD, o_TD, value_TD, self._weights(signs_T1), side)

    def reference(self, x_BLD: Tensor, o_BLD: Tensor, value_BLD: Tensor, signs_BL1: Tensor | None = None) -> Tensor:
        """y as a new tensor, for reference autograd; streams as `arithmetic.reference` holds them."""
        operations, weights = self.arithmetic.reference, self._weights(signs_BL1)
        difference_BLD = x_BLD - weights.centre * o_BLD if weights.centre else x_BLD
        shrunk_BLD = operations.shrunk(difference_BLD, weights.factor)
        if weights.sign is not None:
            shrunk_BLD = shrunk_BLD * weights.sign
        return operations.added(shrunk_BLD, value_BLD, weights.value)

    def gradient_(self, dy_TD: Tensor, do_TD: Tensor, signs_T1: Tensor | None = None) -> None:
        """dy becomes the gradient of x, ∂y/∂x · dy = a·dy, in place; with a centre, −k·a·dy is added to that of o."""
        weights = self._weights(signs_T1)
        if weights.factor != 1.0:
            dy_TD.mul_(weights.factor)
        if weights.sign is not None:
            dy_TD.mul_(weights.sign)
        if weights.centre:
            do_TD.sub_(dy_TD, alpha=weights.centre)

    def value_gradient(self, dy_TD: Tensor, signs_T1: Tensor | None = None) -> Tensor:
        """The gradient of f(o), c·dy: a new tensor, or dy itself where c is 1."""
        return weighted(dy_TD, self._weights(signs_T1).value)

    def _weights(self, signs: Tensor | None) -> Weights:
        """The equation's weights, for tokens with these signs."""
        sign: Tensor | int | None = signs
        if signs is None and self.factor < 0:
            sign = -1
        value: Tensor | float | None = None
        if self.centre > 1 and self.factor:
            value = 1 + (self.centre - 1) * self.factor * (1 if signs is None else signs)
        return Weights(abs(self.factor), int(self.centre), sign, value)
