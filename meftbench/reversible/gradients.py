"""Gradients of trained parameters, gathered over tiles, parts and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Sums:
    """The sum of what is added for each parameter; held in float32 where the parameter is of lower precision."""

    def __init__(self) -> None:
        self._totals: dict[int, Tensor] = {}

    def add(self, parameters: Iterable[Tensor], found: Iterable[Tensor | None]) -> None:
        """Add a gradient, or nothing (None), to each parameter's sum."""
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is None:
                continue
            total = self._totals.get(id(parameter))
            if total is None:
                wide = torch.float32 if parameter.dtype.itemsize < 4 else parameter.dtype
                # A copy: autograd may give one tensor to two parameters, or the very gradient it was given.
                self._totals[id(parameter)] = gradient.to(wide, copy=True)
            else:
                total.add_(gradient)

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums, each in its parameter's dtype; None where nothing was added."""
        totals = [self._totals.get(id(parameter)) for parameter in parameters]
        return [None if t is None else t.to(p.dtype) for t, p in zip(totals, parameters, strict=True)]
