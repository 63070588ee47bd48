"""The layouts of a model: those that the catalogue has for its model type, or else a guessed one."""

from __future__ import annotations

from typing import Any

from torch import nn

from meftbench.backbones.guess import guessed_layout
from meftbench.backbones.layout import Layout
from meftbench.catalogue import resolve
from meftbench.catalogue.backbones import BACKBONES
from meftbench.errors import UserError


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """The layouts of a transformers model, one for each of its lists of layers, in the order in which these run.

    For a model type that is not in the catalogue the layout is guessed (backbones/guess.py).
    Raises UserError: it is no transformers model, or no layout is known and none can be guessed.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        cure = "give a transformers model, a module with one inside, or take method full without levers"
        raise UserError(type(model).__name__, "has no layers of a transformers model", cure)
    if config.model_type not in BACKBONES:
        return (guessed_layout(model),)
    layouts = resolve(BACKBONES[config.model_type].home)
    return (layouts,) if isinstance(layouts, Layout) else tuple(layouts)


def checked_layouts(model: nn.Module) -> tuple[Layout, ...]:
    """What `layouts_of` gives. Raises UserError as it does, and where a model of this configuration cannot be run by
    its sublayers."""
    layouts = layouts_of(model)
    for layout in layouts:
        reason = layout.refuses(model.config)
        if reason:
            raise UserError(type(model).__name__, reason, "choose another model")
    return layouts
