"""CUDA's behaviour for a step that is traced without values: which kernels run, in which precision, and what they save.

Every rule names the source that it was read from; torch 2.6 to 2.13. A rule changes what is allocated, never a shape.
What kernels use while they run is in scratch.py, what differs in older versions in versions.py.

Gradient clipping has no rule, since the measured step (step.py) does not clip. GradScaler is left out: under
fp16-autocast it keeps a scale and a count of steps, and for each step a flag, some blocks of 512 bytes; gradients are
unscaled in place, in `optimizer.step()`.
Shape suffixes: B samples, H heads, Q and K positions of queries and keys, E size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from meftbench.backbones import packed
from meftbench.catalogue.profiles import Profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.methods.levers import fused_loss
from meftbench.prediction.cuda_autocast import cuda_autocast
from meftbench.prediction.experts import groups_on_cuda
from meftbench.prediction.fused_losses import LigerRule, cut_sum
from meftbench.prediction.scratch import HALF
from meftbench.prediction.work import kernel
from meftbench.reversible.kernels import Kernels, as_on


@contextmanager
def cuda_semantics(profile: Profile, versions: Versions = NOW) -> Iterator[None]:
    """Within it, operators on fake CPU tensors or meta tensors allocate as on the device of `profile`."""
    capability = tuple(map(int, profile.compute_capability.split(".")))
    patches: list[AbstractContextManager[Any]] = [
        mock.patch.object(F, "dropout", _dropout),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", _with_meta),
        mock.patch.object(torch, "_fused_sgd_", _in_place),
        mock.patch.object(F, "scaled_dot_product_attention", _Attention(capability, versions.prefers_cudnn_attention)),
        mock.patch.object(packed, "takes_varlen", _takes_varlen(capability, versions)),
        mock.patch.object(fused_loss, "sum_by_liger", LigerRule.of(versions, capability).summed),
        mock.patch.object(fused_loss, "sum_by_cut", cut_sum),
        cuda_autocast(),
        groups_on_cuda(capability),
        # Triton compiles for compute capability 7.0 and later.
        as_on(Kernels(profile.multiprocessors, fused_assumed=capability >= (7, 0), assumed_run=kernel)),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """ATen/native/Dropout.cpp: where p > 0 CUDA takes native_dropout, which saves one byte an element."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _with_meta() -> list[str]:
    """torch/optim/optimizer.py: the devices whose optimizers have one kernel for a step, and the device of a trace."""
    return [*_get_fused_kernels_supported_devices(), "meta"]


def _in_place(*_: Any, **__: Any) -> None:
    """ATen/native/cuda/FusedSgdKernel.cu: writes to what it is given and allocates nothing. It has no meta kernel."""


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


# --- attention ---


class _Attention:
    """scaled_dot_product_attention by the kernel that CUDA takes: ATen/native/transformers/cuda/sdp_utils.cpp."""

    def __init__(self, capability: tuple[int, ...], prefers_cudnn: bool) -> None:
        self.capability, self.prefers_cudnn = capability, prefers_cudnn

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # autocast on CUDA runs attention in the lower precision
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        grouped = query.shape[1] != key.shape[1]
        kernel = attention_kernel(
            query.dtype,
            query.shape[-1],
            attn_mask is not None,
            grouped,
            self.capability,
            dropout_p,
            self.prefers_cudnn,
        )
        if kernel == "cudnn":
            bias = attn_mask
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(bias, 0.0)
            compute_log_sumexp = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            return torch.ops.aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
                query, key, value, bias, compute_log_sumexp, dropout_p, is_causal, scale=scale
            )[0]
        if kernel == "flash":
            size = query.shape[-1]
            if size % 8:  # flash takes head sizes that are multiples of 8; others are padded before
                query, key, value = (F.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
            out = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale or 1 / math.sqrt(size)
            )[0]
            return out[..., :size] if size % 8 else out  # type: ignore[no-any-return]
        if kernel == "efficient":
            bias = attn_mask
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(bias, 0.0)
            if bias is not None:
                bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            compute_log_sumexp = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            return torch.ops.aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
                query, key, value, bias, compute_log_sumexp, dropout_p, is_causal, scale=scale
            )[0]
        return _attention_of_products(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _takes_varlen(capability: tuple[int, ...], versions: Versions) -> Callable[[Tensor, float], bool]:
    """`packed.takes_varlen` on a device of that capability: whether packed rows are read by one kernel. Its allocations
    are those of torch's own fake operator (torch/nn/attention/varlen.py), and of scratch.py."""

    def takes(query: Tensor, dropout: float) -> bool:
        return versions.has_varlen_attention and capability >= (8, 0) and packed.fits_varlen(query, dropout)

    return takes


def attention_kernel(
    dtype: torch.dtype,
    head_size: int,
    masked: bool,
    grouped: bool,
    capability: tuple[int, ...],
    dropout_p: float = 0.0,
    prefers_cudnn: bool = True,
) -> str:
    """The kernel that scaled_dot_product_attention takes on CUDA, the first of these that applies.

    cudnn: half precision, head size at most 128 and a multiple of 8, dropout a multiple of 1/16, compute capability
    9 or 10 (Hopper, and Blackwell for data centres), with or without a mask. flash: half precision, no mask, head size
    at most 256, Ampere or later. efficient: half precision or float32, as many heads of keys as of queries, rows
    of a multiple of 16 bytes. math: otherwise.

    cuDNN comes first in torch 2.13 with a cuDNN above 9.15, which its wheels for CUDA 13 bring and those for 12 do not;
    torch 2.9.1, and TORCH_CUDNN_SDPA_DEPRIORITIZED, put flash first. Both save the same: the output, and one float32
    for each query and head. Source: sdp_utils.cpp, check_prefer_cudnn_attention, can_use_cudnn_attention,
    check_cudnn_dropout; github.com/pytorch/pytorch pull request 138522 made it opt-in in 2.5.1.
    """
    if (
        prefers_cudnn
        and dtype in HALF
        and capability[0] in (9, 10)
        and head_size <= 128
        and head_size % 8 == 0
        and (dropout_p * 16).is_integer()
    ):
        return "cudnn"
    if dtype in HALF and not masked and head_size <= 256 and capability >= (8, 0):
        return "flash"
    aligned = head_size % (4 if dtype == torch.float32 else 8) == 0
    if dtype in (*HALF, torch.float32) and not grouped and aligned and capability >= (5, 0):
        return "efficient"
    return "math"


def _attention_of_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math: half precision is converted to
    float32, queries and keys are both scaled, all scores are in memory; a causal mask is made as a tensor."""
    dtype = query.dtype
    query, key, value = (_wide(t) for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    root = math.sqrt(scale or 1 / math.sqrt(query.shape[-1]))
    scores_BHQK = (query * root) @ (key * root).transpose(-2, -1)
    if is_causal:
        rows = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = torch.zeros_like(rows, dtype=query.dtype).masked_fill(rows.logical_not(), -math.inf)
    if mask is not None:
        scores_BHQK = scores_BHQK + (mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=query.dtype))
    weights_BHQK = _dropout(torch.softmax(scores_BHQK, -1), dropout_p)
    return (weights_BHQK @ value).to(dtype)
