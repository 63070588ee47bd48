"""`save_pretrained` of a model with a method in it: what it writes is not what `from_pretrained` reads."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from meftbench.errors import UserError
from meftbench.methods.bottleneck import Bottleneck
from meftbench.reversible import ReversibleStack


def warn_on_save(model: nn.Module) -> None:
    """From now on, until `unload`, `model.save_pretrained` says what `from_pretrained` will make of its files."""
    if isinstance(model, PreTrainedModel) and _lost(model):
        # On the instance and by a partial: it is copied and pickled with the model.
        model.save_pretrained = partial(_save_pretrained, model)


def check_not_held_twice(whole: nn.Module) -> None:
    """Raises UserError where a layer that a reversible stack has taken is held by another list as well, which would run
    it as it was."""
    stacks = [module for module in whole.modules() if isinstance(module, ReversibleStack)]
    taken = {id(block.get_submodule("layer")) for stack in stacks for block in stack.blocks}
    for name, module in whole.named_modules():
        if isinstance(module, nn.ModuleList) and any(id(layer) in taken for layer in module):
            what = f"{name!r} holds layers that are reversible now, and would run them as they were"
            cure = "hold the transformers model alone, and take its layers from it"
            raise UserError(type(whole).__name__, what, cure)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    # Trainer's checkpoints are written so, and are read back into the same module: no error.
    warnings.warn(
        f"from_pretrained will not find {_lost(model)} in what save_pretrained writes: use meftbench.save_adapter and "
        "load_adapter, or meftbench.unload first",
        UserWarning,
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **kwargs)


def _lost(model: nn.Module) -> str:
    if any(isinstance(module, ReversibleStack) for module in model.modules()):
        return "the reversible layers"
    return "the adapters" if any(isinstance(module, Bottleneck) for module in model.modules()) else ""
