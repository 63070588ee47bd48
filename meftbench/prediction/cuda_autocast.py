"""The lists of CUDA's autocast for tensors on the CPU, whose own autocast runs other operators in float32.

Source: ATen/autocast_mode.h of torch 2.13, AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE and AT_FORALL_PROMOTE. The
operators that run in the lower precision are the same on both devices but for those in `_LOWER`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEY = "AutocastCPU"
_HALF = (torch.float16, torch.bfloat16)

# Inputs are converted to float32.
_WIDENED = [
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
    "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim",
    "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d",
    "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss",
    "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp", "norm.Scalar",
    "norm.ScalarOpt_dim",
]  # fmt: skip
# The operator is asked for a result in float32; its input stays as it is, unless the caller asks for a dtype.
_RESULT_WIDENED = [
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
]  # fmt: skip
# Inputs are converted to the widest of their dtypes.
_PROMOTED = [
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
]  # fmt: skip
# Inputs are converted to the lower precision.
_LOWER = [
    "addmv", "addr", "mv", "einsum", "chain_matmul", "linalg_multi_dot", "prelu",
]  # fmt: skip


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within it, autocast on the CPU converts what autocast on CUDA would. It holds for the whole process."""
    library = torch.library.Library("aten", "IMPL")
    kinds: list[tuple[list[str], Callable[[Any], Callable[..., Any]]]] = [
        (_WIDENED, _widened), (_RESULT_WIDENED, _result_widened), (_PROMOTED, _promoted), (_LOWER, _lowered)
    ]  # fmt: skip
    try:
        for names, kernel in kinds:
            for name in names:
                operator = _operator(name)
                # Where the CPU has an entry of its own, it says the same (of _LOWER and _WIDENED).
                if operator is None or torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), _KEY):
                    continue
                library.impl(operator, kernel(operator), _KEY)
        yield
    finally:
        library._destroy()


def _operator(name: str) -> Any:
    """The overload `name`, such as `pow.Scalar`; None where this version of torch has none."""
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return getattr(packet, overload or "default", None)


def _without_autocast(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return operator(*args, **kwargs)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """`value`, if it is a tensor of a floating-point dtype, or a list with such tensors, in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, list | tuple):
        return [_converted(item, dtype) for item in value]
    return value


def _called(operator: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args = tuple(_converted(value, dtype) for value in args)
    return _without_autocast(operator, args, {name: _converted(value, dtype) for name, value in kwargs.items()})


def _widened(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _called(operator, torch.float32, args, kwargs)


def _lowered(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _called(operator, torch.get_autocast_dtype("cpu"), args, kwargs)


def _promoted(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        wide = any(tensor.dtype == torch.float32 for tensor in tensors)
        dtype = torch.float32 if wide else torch.get_autocast_dtype("cpu")
        return _called(operator, dtype, args, kwargs)

    return kernel


def _result_widened(operator: Any) -> Callable[..., Any]:
    """softmax and log_softmax of bfloat16 convert their input nevertheless; for float16 there are kernels that read it
    as it is (SoftMax.cpp), as sums do."""
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index("dtype")
    from_half = {"aten::softmax": torch.ops.aten._softmax, "aten::log_softmax": torch.ops.aten._log_softmax}.get(
        operator._schema.name
    )

    def kernel(*args: Any, **kwargs: Any) -> Any:
        asked = args[place] if len(args) > place else kwargs.get("dtype")
        if from_half and args[0].dtype == torch.float16 and asked in (None, torch.float32):
            return _without_autocast(from_half, (args[0], args[1], True), {})
        if asked is None and isinstance(args[0], Tensor) and args[0].dtype in _HALF:
            args, kwargs = args[:place], kwargs | {"dtype": torch.float32}
        return _without_autocast(operator, args, kwargs)

    return kernel
