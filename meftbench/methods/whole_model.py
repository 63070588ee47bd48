"""Checks of a whole model with a method applied: a warning on `save_pretrained`, and layers held in two places."""

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
    """Make `model.save_pretrained` warn, until `unload`, of what `from_pretrained` will not find in its files."""
    if isinstance(model, PreTrainedModel) and _lost(model):
        # Set on the instance, as a partial, so that it is copied and pickled with the model.
        model.save_pretrained = partial(_save_pretrained, model)


def check_not_held_twice(whole: nn.Module) -> None:
    """Raises UserError where another list also holds a layer of a reversible stack, and would run it as an ordinary
    layer."""
    stacks = [module for module in whole.modules() if isinstance(module, ReversibleStack)]
    taken = {id(block.get_submodule("layer")) for stack in stacks for block in stack.blocks}
    for name, module in whole.named_modules():
        if isinstance(module, nn.ModuleList) and any(id(layer) in taken for layer in module):
            what = f"{name!r} holds layers that are reversible now, and would run them as they were"
            cure = "hold the transformers model alone, and take its layers from it"
            raise UserError(type(whole).__name__, what, cure)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    # A warning and no error: Trainer writes checkpoints by this method, and reads them back into the same module.
    warnings.warn(
        f"from_pretrained will not find {_lost(model)} in what save_pretrained writes: use meftbench.save_adapter and "
        "load_adapter, or meftbench.unload first",
        UserWarning,
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **kwargs)


def _lost(model: nn.Module) -> str:
    """What `from_pretrained` leaves out of the files that `save_pretrained` writes; empty: nothing."""
    if any(isinstance(module, ReversibleStack) for module in model.modules()):
        return "the reversible layers"
    return "the adapters" if any(isinstance(module, Bottleneck) for module in model.modules()) else ""
