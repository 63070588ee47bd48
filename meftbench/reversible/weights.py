"""The numbers in a coupling's equation (coupling.py), as the operations of an arithmetic take them for a tile."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """y = sign · factor · (x − centre · o) + value · f(o), for tokens (T, D).

    factor: at least 0; 0 where y is only f(o).  centre: 0: o is in the equation by f(o) alone.
    sign: −1, or ±1 for each token (T, 1), int8; None: +1.  value: one for all tokens, or (T, 1); None: 1.
    """

    factor: float
    centre: int = 0
    sign: Tensor | int | None = None
    value: Tensor | float | None = None

    @property
    def fusable(self) -> bool:
        """Whether the fused kernels (fused.py) know the equation."""
        return self.factor > 0 and self.centre <= 1 and self.sign is None and self.value is None


def weighted(value: Tensor, weight: Tensor | float | None) -> Tensor:
    """weight · value: a new tensor, or `value` itself where the weight is None, which stands for 1."""
    return value if weight is None else value * weight
