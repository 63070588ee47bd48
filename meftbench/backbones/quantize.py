"""4-bit base weights (QLoRA, Dettmers et al. 2023) through bitsandbytes, under any method that freezes them."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import nn

from meftbench.backbones.layout import base_of
from meftbench.errors import UserError


def quantize(model: nn.Module) -> nn.Module:
    """Replace the base model's linear layers, in place, by frozen ones whose weights are 4-bit NormalFloat.

    Biases, norms, embeddings and heads keep the model's dtype, in which computations are done. bitsandbytes quantises
    the weights when the model is moved to its device. This does the same as `BitsAndBytesConfig(load_in_4bit=True,
    bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)` of transformers, but for any weights, random ones too.

    Raises UserError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("precision nf4", "bitsandbytes is not installed", "pip install 'meftbench[quantize]'")
    import bitsandbytes

    head = cast(Any, model).get_output_embeddings()
    for module in list(base_of(model).modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, _quantized(child, bitsandbytes))
    # peft reads this attribute before it wraps such layers.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def _quantized(linear: nn.Linear, bitsandbytes: Any) -> nn.Module:
    quantized: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    quantized.train(linear.training)
    keep_layout(quantized)
    return quantized


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging the 4-bit weights of `model` for inference; other layers are not changed.

    On a processor with AVX512-BF16 the first forward in evaluation mode rearranges the weights in place for a kernel
    that has no backward, and training does not work afterwards. Such a forward may be
    the calibration of a fixed-point range, or an evaluation between two epochs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(model: nn.Module) -> bool:
    """Whether the model's weights are quantised, by `quantize` or by transformers when it loaded them."""
    return bool(getattr(model, "is_loaded_in_4bit", False)) or getattr(model, "hf_quantizer", None) is not None


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
