"""4-bit base weights (QLoRA, Dettmers et al. 2023) through bitsandbytes, under any method that freezes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from meftbench.backbones.layout import base_of
from meftbench.errors import UserError

STATISTICS = ("absmax", "code", "offset")  # bitsandbytes' names of the tensors in a QuantState, nested ones too


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


def pack_without_values(model: nn.Module) -> None:
    """Pack the 4-bit weights of `model`, in place, where they are on torch's meta device.

    Other weights are packed when the model is moved to its device, from which bitsandbytes excludes the meta device.
    Its operators have implementations for it all the same, and with them its own `quantize_4bit` gives the shapes of
    what it keeps of a weight. Models that have no such weights are not changed.
    """
    # By `_parameters`, since a layer of peft has the `weight` of the layer that it wraps as a property.
    modules = [module for module in model.modules() if _is_unpacked(module._parameters.get("weight"))]
    if not modules:
        return
    import bitsandbytes

    # bitsandbytes computes the table of 256 values that statistics are rounded to, with values, and keeps a copy on the
    # weights' device for later calls. One without values must not stay there, or weights that have values could not be
    # packed in this process afterwards.
    with mock.patch.dict(bitsandbytes.functional.name2qmap, clear=True), torch.device("cpu"):
        for module in modules:
            weight = cast(Any, module.weight)
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight.data,
                blocksize=weight.blocksize,
                compress_statistics=weight.compress_statistics,
                quant_type=weight.quant_type,
                quant_storage=weight.quant_storage,
            )
            module.weight = bitsandbytes.nn.Params4bit(
                packed,
                requires_grad=False,
                quant_state=state,
                blocksize=weight.blocksize,
                compress_statistics=weight.compress_statistics,
                quant_type=weight.quant_type,
                quant_storage=weight.quant_storage,
                bnb_quantized=True,
            )


def _is_unpacked(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.is_meta and not getattr(weight, "bnb_quantized", True)


def statistics_of(model: nn.Module) -> Iterator[Tensor]:
    """What 4-bit weights hold beside their packed values, which `parameters()` and `buffers()` do not give.

    For each weight: a scale for each block of 64 values, as one byte; a float32 for each 256 of those; their offset,
    a scalar; and the tables of 16 and of 256 float32 values that both are looked up in. Models without such weights
    give nothing.
    """
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for name in STATISTICS:
                tensor = getattr(part, name, None)
                if isinstance(tensor, Tensor):
                    yield tensor


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
