"""Products with 4-bit weights as bitsandbytes computes them on CUDA: the whole weight is unpacked before.

Shape suffixes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def unfused_products() -> Iterator[None]:
    """Within it, bitsandbytes' product with a 4-bit weight runs as the operators that it consists of on CUDA, so that a
    counter sees what they allocate. Without bitsandbytes nothing changes.

    bitsandbytes 0.50 has one operator for all of it. On CUDA that runs a fused kernel, which unpacks the weight in
    registers, for at most 1,536 tokens and only where that is the faster way on the GPU at hand; else it unpacks the
    whole weight (backends/cuda/ops.py). Which of them is not foreseen here: the weight counts as unpacked. That is too
    much in forward, by one weight at a time; in backward the weight is always unpacked. Older versions call the
    separate operators themselves.
    """
    library = torch.ops.bitsandbytes
    if not hasattr(library, "gemm_4bit"):
        yield
        return
    with mock.patch.object(library, "gemm_4bit", SimpleNamespace(default=_unfused)):
        yield


def _unfused(
    tokens_MK: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """The arguments are those of the operator `bitsandbytes::gemm_4bit`, which passes some by keyword."""
    operators, scales = torch.ops.bitsandbytes, absmax
    if absmax_8bit is not None:  # double quantization; on CUDA both tensors of scales live until the product is done
        rounded = operators.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        scales = rounded + absmax_offset
    weight_NK = operators.dequantize_4bit.default(packed, scales, blocksize, quant_type, shape, tokens_MK.dtype)
    return F.linear(tokens_MK, weight_NK, bias)
