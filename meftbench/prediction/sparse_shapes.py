"""Sparse matrices of which only shapes are known: torch has no implementation of their operators without values.

Two methods of HF peft make such matrices: SHiRA adds one to a weight, and FRoD multiplies with one. What torch's
operators return for them on a CPU is allocated here, in the same order. What kernels allocate while they run is not: it
is a few times the indices, which are few beside the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_sparse_of_values = torch.sparse_coo_tensor


@contextmanager
def sparse_shapes() -> Iterator[None]:
    """Within it, `torch.sparse_coo_tensor` of tensors without values gives a `SparseShape`."""
    with mock.patch.object(torch, "sparse_coo_tensor", _sparse_coo_tensor):
        yield


def _sparse_coo_tensor(indices: Any, values: Any, size: Any = None, **kwargs: Any) -> Any:
    if isinstance(values, FakeTensor) or (isinstance(values, Tensor) and values.is_meta):
        return SparseShape(indices.to(torch.int64), values, tuple(size))
    return _sparse_of_values(indices, values, size, **kwargs)


class SparseShape:
    """A sparse matrix. indices: (2, count), int64.  values: (count,); they have gradients.  size: rows, columns.
    coalesced: whether its indices are sorted, each of them once.
    """

    def __init__(self, indices: Tensor, values: Tensor, size: tuple[int, ...], coalesced: bool = False) -> None:
        self.indices, self.values, self.size, self.coalesced = indices, values, size, coalesced

    def coalesce(self) -> SparseShape:
        if self.coalesced:
            return self
        indices, values = _Coalesced.apply(self.indices, self.values)  # type: ignore[no-untyped-call]
        return SparseShape(indices, values, self.size, coalesced=True)

    def to_dense(self) -> Tensor:
        return _Dense.apply(self.indices, self.values, self.size)  # type: ignore[no-untyped-call, no-any-return]

    def _nnz(self) -> int:
        return len(self.values)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        left, right = args[:2]
        if func in (torch.Tensor.add_, torch.Tensor.__iadd__) and isinstance(left, Tensor):
            return left.add_(_Added.apply(right.indices, right.values, right.size))  # type: ignore[no-untyped-call]
        if func is torch.sparse.mm and isinstance(left, cls):
            return _Product.apply(left.indices, left.values, right, left.size)  # type: ignore[no-untyped-call]
        return NotImplemented


def _gathered(indices: Tensor, values: Tensor) -> Tensor:
    """What `sparse_mask` returns: new indices, which end with it, and new values."""
    kept = indices.clone()
    picked = torch.empty_like(values)
    del kept
    return picked


class _Added(torch.autograd.Function):
    """What is added to a dense matrix: one value, seen at every place, so that nothing is allocated."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(indices, values)
        return values.detach().as_strided(size, (0, 0))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, _gathered(*ctx.saved_tensors), None


class _Coalesced(torch.autograd.Function):
    """Sorted indices and values, which are new."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices, values)
        ordered = torch.empty_like(indices)
        ctx.mark_non_differentiable(ordered)
        return ordered, torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, _gathered(*ctx.saved_tensors)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(indices, values)
        return values.new_zeros(size)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, _gathered(*ctx.saved_tensors), None


class _Product(torch.autograd.Function):
    """A sparse matrix (N, K) times a dense one (K, M)."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, dense_KM: Tensor, size: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(indices, values, dense_KM)
        ctx.size = size
        zeros_NM = values.new_zeros(size[0], dense_KM.shape[1])  # torch adds the product to it
        product_NM = torch.empty_like(zeros_NM)
        del zeros_NM
        return product_NM

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_NM,), (indices, values, dense_KM) = gradients, ctx.saved_tensors
        whole_NK = gradient_NM @ dense_KM.t()  # torch makes the whole gradient, and then picks from it
        of_values = _gathered(indices, values)
        del whole_NK
        transposed = indices.clone(), values.clone()
        of_dense = values.new_empty(ctx.size[1], gradient_NM.shape[1])
        del transposed
        return None, of_values, of_dense, None
