"""Gradients of trained parameters, summed over tiles, parts and blocks; and what they begin at for a tile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Sums:
    """A sum of gradients for each parameter. wide: in float32 where the parameter has lower precision, which takes
    twice the memory; else in the parameter's precision, as autograd adds them."""

    def __init__(self, *, wide: bool = True) -> None:
        self._wide = wide
        self._totals: dict[int, Tensor] = {}

    def add(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
        """Add to each parameter's sum its gradient; None adds nothing."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            total = self._totals.get(id(parameter))
            if total is None:
                sum_dtype = torch.float32 if self._wide and parameter.dtype.itemsize < 4 else parameter.dtype
                # A copy: autograd may return one tensor for two parameters, or the output gradient it was given.
                self._totals[id(parameter)] = gradient.to(sum_dtype, copy=True)
            else:
                total.add_(gradient)

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums, each in its parameter's dtype; None where nothing was added."""
        totals = [self._totals.get(id(parameter)) for parameter in parameters]
        return [None if t is None else t.to(p.dtype) for t, p in zip(totals, parameters, strict=True)]


def edges_of(
    value_1TD: Tensor, dy_1TD: Tensor, tapped: Sequence[Tensor], of_tapped: Sequence[Tensor], rows: slice
) -> tuple[list[GradientEdge], list[Tensor]]:
    """Where the backward pass through a tile begins: the edges of its value and of what was tapped in it (taps.py), and
    the gradient of each. By edges instead of tensors, so that a value is freed before its graph is back-propagated
    through.

    dy_1TD: the gradient of the value.  of_tapped: gradients (N, X) of what all tiles passed on.  rows: the tile's.
    """
    edges, gradients = [get_gradient_edge(value_1TD)], [dy_1TD.to(value_1TD.dtype)]
    for tensor_TX, gradient_NX in zip(tapped, of_tapped, strict=True):
        if tensor_TX.requires_grad:
            edges.append(get_gradient_edge(tensor_TX))
            gradients.append(gradient_NX[rows])
    return edges, gradients
