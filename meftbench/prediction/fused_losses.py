"""What the fused losses of liger-kernel and cut-cross-entropy allocate on CUDA, for a step traced without values.

They take the place of the libraries' own functions (methods/levers/fused_loss.py) in a trace: Triton's kernels have no
implementation for tensors without values. Every rule names the source that it was read from. A kernel itself allocates
nothing: what is here is what the functions around them do.
Shape suffixes: N tokens of the batch, T tokens of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meftbench.catalogue.versions import Versions
from meftbench.prediction.scratch import HALF
from meftbench.prediction.work import kernel


@dataclass(frozen=True)
class LigerRule:
    """How a version of Liger allocates. Source: src/liger_kernel/ops/fused_linear_cross_entropy.py.

    widens: logits are converted to float32 and back, and multiplied by the chunk's share of the tokens (0.4).
    reuses: one buffer has the logits of all chunks, by `torch.mm(..., out=)` (0.8.5).
    adds_products: the gradient of the weight is a chunk's product, and its copy in float32, added to the sum (0.6.2 to
        0.8.0; later only where the compute capability is below 8.0, or the weights are float32), instead of addmm into
        the sum.
    """

    widens: bool = False
    reuses: bool = True
    adds_products: bool = False

    @classmethod
    def of(cls, versions: Versions, capability: tuple[int, ...]) -> LigerRule:
        """The rule of a version of Liger on a device of that compute capability."""
        liger = versions.liger
        if liger is None or liger >= (0, 8):
            return cls(adds_products=capability < (8, 0))
        return cls(widens=liger < (0, 5), reuses=False, adds_products=liger >= (0, 7))

    def summed(
        self, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None, ignored: int, cap: float | None
    ) -> Tensor:
        """In the place of `fused_loss.sum_by_liger`."""
        loss: Tensor = _Liger.apply(h_ND, weight_VD, labels_N, bias_V, ignored, self)  # type: ignore[no-untyped-call]
        return loss


def chunk_rows(tokens: int, vocabulary: int, hidden: int) -> int:
    """Tokens of a chunk of Liger's: the next power of two of tokens / (V / D), each division rounded up."""
    rows = -(-tokens // -(-vocabulary // hidden))
    return min(1 << (rows - 1).bit_length(), tokens)


class _Liger(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        ignored: int,
        rule: LigerRule,
    ) -> Tensor:
        tokens, hidden = h_ND.shape
        rows = chunk_rows(tokens, len(weight_VD), hidden)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        dh_ND = torch.zeros_like(h_ND)
        with_gradients = ctx.needs_input_grad[0]
        dweight_VD = torch.zeros_like(weight_VD) if with_gradients and ctx.needs_input_grad[1] else None
        dbias_V = torch.zeros_like(bias_V) if with_gradients and bias_V is not None else None
        losses_N = torch.zeros(tokens, dtype=torch.float32, device=h_ND.device)
        labelled_N = labels_N != ignored  # alive until the loss is there
        labelled_N.sum()
        # Operators with `out` are not autocast: they are taken where their result would be the same.
        reuses = rule.reuses and h_ND.dtype == weight_VD.dtype and autocast in (None, h_ND.dtype)
        buffer_TV = h_ND.new_empty(rows, len(weight_VD)) if reuses and bias_V is None else None
        logits_TV = shared_TV = None
        for start in range(0, tokens, rows):
            h_TD = h_ND[start : start + rows]
            if buffer_TV is not None:
                logits_TV = torch.mm(h_TD, weight_VD.t(), out=buffer_TV[: len(h_TD)])
            else:
                logits_TV = h_TD @ weight_VD.t()
                if bias_V is not None:
                    logits_TV = logits_TV + bias_V
            if rule.widens:
                logits_TV = logits_TV.float()
                logits_TV = logits_TV.to(autocast or h_ND.dtype)
                # The one before is given back only when this one is there.
                shared_TV = logits_TV * 1.0
            else:
                shared_TV = logits_TV
            # The kernel writes losses, and in place of the logits their gradients.
            kernel("liger cross-entropy", [shared_TV], [shared_TV])
            if with_gradients:
                dh_ND[start : start + rows] = shared_TV @ weight_VD
            if dweight_VD is not None:
                in_place = logits_TV.dtype in HALF and dweight_VD.dtype in (logits_TV.dtype, torch.float32)
                if in_place and not rule.adds_products:
                    # addmm into the sum; of a float32 one, too. It takes no memory but for the hidden states' copy.
                    copy_TD = h_TD.to(logits_TV.dtype)
                    flops = 2 * logits_TV.numel() * hidden
                    kernel("addmm into the sum", [logits_TV, copy_TD, dweight_VD], [dweight_VD], flops)
                    del copy_TD
                else:
                    dweight_VD += torch.mm(logits_TV.t(), h_TD.to(logits_TV.dtype)).float()
            if dbias_V is not None:
                dbias_V.add_(logits_TV.sum(dim=0))
        # Without the buffer, logits are given back when the next chunk's are there.
        del buffer_TV
        ctx.save_for_backward(dh_ND, dweight_VD, dbias_V)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        torch.empty_like(gradient)  # the number 1, with which the gradient of the loss is compared
        dh_ND, dweight_VD, dbias_V = ctx.saved_tensors
        return dh_ND, dweight_VD, None, dbias_V, None, None


def cut_sum(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignored: int, cap: float | None) -> Tensor:
    """In the place of `fused_loss.sum_by_cut`. Source: cut_cross_entropy 25.1.1, cce.py, cce_lse_forward.py,
    indexed_dot.py, cce_backward.py, utils.py. All tokens are taken for labelled ones."""
    labelled_N = labels_N != ignored
    # nonzero gives numbers of 64 bits, of which those of 32 bits are kept; some tokens, the last of each sample at
    # least, have no label.
    numbers_N = torch.empty_like(labels_N).to(torch.int32)
    del labelled_N
    loss: Tensor = _Cut.apply(h_ND.contiguous(), weight_VD, labels_N, numbers_N, cap)  # type: ignore[no-untyped-call]
    return loss


def _product(h_ND: Tensor, weight_VD: Tensor) -> int:
    """Operations of the product that gives all logits."""
    return 2 * h_ND.numel() * len(weight_VD)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, numbers_N: Tensor, cap: float | None
    ) -> Tensor:
        tokens, vocabulary = len(h_ND), len(weight_VD)
        normalizers_N = h_ND.new_empty(tokens, dtype=torch.float32)
        locks = h_ND.new_empty(-(-tokens // 128), dtype=torch.int32)
        with_gradients = any(ctx.needs_input_grad)
        # The mean of each class's logits, by which blocks of classes are sorted in the backward pass.
        means_V = h_ND.new_empty(vocabulary, dtype=torch.float32) if with_gradients else None
        # Logits are made a block at a time, and never written.
        kernel("cut logsumexp", [h_ND, weight_VD], [normalizers_N, means_V], _product(h_ND, weight_VD))
        kernel("cut indexed product", [h_ND, h_ND], [normalizers_N])
        del locks
        losses_N = h_ND.new_zeros(tokens, dtype=torch.float32)
        if cap is not None:
            losses_N = torch.empty_like(losses_N)  # compiled into one kernel
        losses_N.add_(normalizers_N)
        ctx.save_for_backward(h_ND, weight_VD, normalizers_N, labels_N, numbers_N, means_V)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, weight_VD, _, _, numbers_N, means_V = ctx.saved_tensors
        order_V = torch.argsort(means_V).to(torch.int32)
        dh_ND = torch.zeros_like(h_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=h_ND.dtype) if ctx.needs_input_grad[1] else None
        columns = -(-weight_VD.shape[1] // 64)
        locks = [
            h_ND.new_zeros(-(-rows // columns), columns, dtype=torch.int32) for rows in (len(h_ND), len(weight_VD))
        ]
        # The logits once more, and a product for each gradient. Blocks whose gradients are too small to count are left
        # out by the kernel; how many depends on values, so all are counted.
        products = 2 + (dweight_VD is not None)
        flops = products * _product(h_ND, weight_VD)
        kernel("cut backward", [h_ND, weight_VD, order_V], [dh_ND, dweight_VD], flops)
        del locks, order_V, numbers_N
        return dh_ND, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype), None, None, None
