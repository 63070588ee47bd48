"""Gradients of trained parameters, summed over tiles, parts and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Sums:
    """A sum of gradients for each parameter, in float32 where the parameter has lower precision."""

    def __init__(self) -> None:
        self._totals: dict[int, Tensor] = {}

    def add(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
        """Add to each parameter's sum its gradient; None adds nothing."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            total = self._totals.get(id(parameter))
            if total is None:
                sum_dtype = torch.float32 if parameter.dtype.itemsize < 4 else parameter.dtype
                # A copy: autograd may return one tensor for two parameters, or the output gradient it was given.
                self._totals[id(parameter)] = gradient.to(sum_dtype, copy=True)
            else:
                total.add_(gradient)

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums, each in its parameter's dtype; None where nothing was added."""
        totals = [self._totals.get(id(parameter)) for parameter in parameters]
        return [None if t is None else t.to(p.dtype) for t, p in zip(totals, parameters, strict=True)]
