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
