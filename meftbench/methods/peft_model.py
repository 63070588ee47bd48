"""A model in peft's wrapper."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def wrapped_by_peft(model: nn.Module, config: Any) -> nn.Module:
    """`peft.get_peft_model`, without a warning that is meant for peft's developers.

    peft 0.21 reads a property of transformers 5 by its old name, which transformers warns about.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


# What peft calls LoRA's first factors: of linear layers and convolutions, and of embeddings.
_FIRST_FACTORS = ("lora_A", "lora_embedding_A")


def freeze_first_factors(wrapped: nn.Module) -> None:
    """Freeze the first factor A of every LoRA update in peft's wrapper, and keep it frozen.

    peft makes all factors of an adapter trainable again whenever the adapter is switched on: by `set_adapter`, and when
    its context `disable_adapter` ends. A is then trained or, where the optimizer does not hold it, gets gradients for
    nothing, and x is kept for them; nothing says so. From peft 0.20 on a layer may name factors that stay frozen.
    """
    from peft.tuners.lora import LoraLayer

    for layer in wrapped.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in _FIRST_FACTORS:
            getattr(layer, name).requires_grad_(False)
        adapters = {*layer.lora_A, *layer.lora_embedding_A}
        # On the instance: the class's own dictionary is shared by all layers.
        layer.frozen_peft_weight_names = dict.fromkeys(adapters, _FIRST_FACTORS)
