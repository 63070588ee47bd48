"""The layouts of a model: those of its type in the catalogue, or guessed ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from meftbench.backbones.guess import guessed_layout
from meftbench.backbones.layout import Layout
from meftbench.catalogue import resolve
from meftbench.catalogue.backbones import BACKBONES
from meftbench.errors import UserError


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """The layouts of a transformers model, one a list of layers, in the order in which they run.

    A type that is not in the catalogue is guessed at (backbones/guess.py).
    Raises UserError where there is no layout and none can be guessed.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        cure = "give a transformers model, a module with one inside, or take method full without levers"
        raise UserError(type(model).__name__, "has no layers of a transformers model", cure)
    if config.model_type not in BACKBONES:
        return (guessed_layout(model),)
    found = resolve(BACKBONES[config.model_type].home)
    return (found,) if isinstance(found, Layout) else tuple(found)


def checked_layouts(model: nn.Module) -> tuple[Layout, ...]:
    """The same. Raises UserError where the model's configuration cannot be split."""
    layouts = layouts_of(model)
    for layout in layouts:
        reason = layout.refuses(model.config)
        if reason:
            raise UserError(type(model).__name__, reason, "choose another model")
    return layouts
