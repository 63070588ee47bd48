"""`+liger_loss`, `+cut_loss` (levers): linear layer and cross-entropy in one function of a library of Triton kernels.

liger: LigerFusedLinearCrossEntropyFunction of liger-kernel (Hsu et al. 2024) makes the logits a chunk of tokens at a
time, and all gradients in the forward pass, in the dtype of the weight.
Source: liger_kernel/ops/fused_linear_cross_entropy.py.
cut: linear_cross_entropy of cut-cross-entropy (Wijmans et al. 2025) never has logits in memory. By default, it leaves
out of gradients what is below the rounding of 16 bits. Source: cut_cross_entropy/cce.py.

A prediction takes the place of `sum_by_liger` and `sum_by_cut` with functions that allocate as these do
(prediction/fused_losses.py).
Shape suffixes: N tokens of the batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meftbench.errors import UserError
from meftbench.methods.applied import Applied
from meftbench.methods.levers.vocabulary_loss import Head, LossLever, SummedLoss


class LigerLossLever(LossLever):
    """Computes the loss by Liger's fused linear cross-entropy."""

    name = "liger_loss"

    def loss_of(self, model: PreTrainedModel, applied: Applied) -> SummedLoss:
        return Liger()


class CutLossLever(LossLever):
    """Computes the loss by cut cross-entropy."""

    name = "cut_loss"

    def loss_of(self, model: PreTrainedModel, applied: Applied) -> SummedLoss:
        return Cut()


class Liger(SummedLoss):
    """The loss by Liger's function, of logits in the dtype of the weight; its sum is float32."""

    def refusal(self, head: Head) -> str | None:
        if not head.is_linear:
            return _NOT_LINEAR
        return "its head has two biases" if head.module.bias is not None and head.bias is not None else None

    def __call__(self, head: Head, h_ND: Tensor, labels_N: Tensor, ignored: int) -> Tensor:
        bias_V = head.module.bias if head.bias is None else head.bias[0].to(h_ND.device)
        weight_VD = head.module.weight
        return sum_by_liger(_with_gradient(h_ND, weight_VD), weight_VD, labels_N, bias_V, ignored, head.cap)


class Cut(SummedLoss):
    """The loss by cut cross-entropy, of hidden states in 16 bits; its sum is float32."""

    def refusal(self, head: Head) -> str | None:
        if not head.is_linear:
            return _NOT_LINEAR
        has_bias = head.module.bias is not None or head.bias is not None
        return "cut cross-entropy has no bias of the logits, and its head has one" if has_bias else None

    def __call__(self, head: Head, h_ND: Tensor, labels_N: Tensor, ignored: int) -> Tensor:
        device = "cpu" if h_ND.is_meta else h_ND.device.type  # what a prediction traces has the autocast of the CPU
        if torch.is_autocast_enabled(device):
            h_ND = h_ND.to(torch.get_autocast_dtype(device))  # as autocast has a Linear's input
        if h_ND.dtype not in (torch.float16, torch.bfloat16):
            what = f"cut cross-entropy has gradients in 16 bits only, and the hidden states are {_name(h_ND.dtype)}"
            raise UserError("cut_loss", what, "take precision bf16 or bf16-autocast, or liger_loss")
        weight_VD = head.module.weight
        return sum_by_cut(_with_gradient(h_ND, weight_VD), weight_VD, labels_N, ignored, head.cap)


_NOT_LINEAR = "its head is no plain Linear, whose weight the kernel could take"


def sum_by_liger(
    h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None, ignored: int, cap: float | None
) -> Tensor:
    """The sum of cross-entropies of tokens whose label is not `ignored` (a scalar, float32).

    cap: logits x become cap · tanh(x / cap); None: they stay as they are.
    Raises UserError: liger-kernel is not installed, or the tensors are not on a GPU.
    """
    _check_device("liger_loss", h_ND)
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise _absent("liger_loss", "liger-kernel", error) from None
    # Arguments by position, as an autograd function takes them: of both, weights of classes, the square of the
    # normalizer and label smoothing are left at what leaves them out.
    result = LigerFusedLinearCrossEntropyFunction.apply(
        h_ND, weight_VD, labels_N, bias_V, None, ignored, 0.0, 0.0, "sum", cap
    )
    loss: Tensor = result[0]
    return loss


def sum_by_cut(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignored: int, cap: float | None) -> Tensor:
    """As `sum_by_liger`, by cut cross-entropy. h_ND: in 16 bits.

    Raises UserError: cut-cross-entropy is not installed, or the tensors are not on a GPU.
    """
    _check_device("cut_loss", h_ND)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise _absent("cut_loss", "cut-cross-entropy", error) from None
    loss: Tensor = linear_cross_entropy(
        h_ND, weight_VD, labels_N, ignore_index=ignored, softcap=cap, reduction="sum", impl="cce"
    )
    return loss


def _with_gradient(h_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The hidden states, of which a gradient is asked for where only the head is trained: both libraries make that of
    the weight beside that of the hidden states, Liger not without it."""
    if torch.is_grad_enabled() and weight_VD.requires_grad and not h_ND.requires_grad:
        return h_ND.detach().requires_grad_()
    return h_ND


def _check_device(lever: str, h_ND: Tensor) -> None:
    # Triton's interpreter runs kernels on the CPU, for tests; it is asked for before triton is imported.
    if not h_ND.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        what = f"its Triton kernels run on CUDA, and the model is on {h_ND.device.type}"
        raise UserError(lever, what, "use a GPU, predict it (--device predicted:h100), or take chunked_loss")


def _absent(lever: str, package: str, error: Exception) -> UserError:
    return UserError(lever, f"{package} cannot be imported ({error})", "pip install 'meftbench[loss]'")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
