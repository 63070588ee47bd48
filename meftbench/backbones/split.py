"""Checks, before a method is applied, that a model's layers can be run by their sublayers and in tiles of tokens."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from meftbench.backbones.find import checked_layouts
from meftbench.backbones.held import check_held, check_layers
from meftbench.backbones.layout import Layout, present
from meftbench.backbones.patched import (
    check_classes,
    check_forwards,
    check_not_replaced,
    check_one_device,
    check_tokens_alone,
    hooked,
)
from meftbench.catalogue.backbones import BACKBONES


def split_layouts(model: nn.Module) -> tuple[Layout, ...]:
    """The layouts of a model, for a method that runs layers by their sublayers or puts modules into them. Raises
    UserError as `checked_layouts` and `check_split` do."""
    layouts = checked_layouts(model)
    check_split(model, layouts)
    return layouts


def check_split(model: nn.Module, layouts: tuple[Layout, ...]) -> None:
    """Raises UserError where the model is spread over devices, or where a layer is not as its layout describes it: its
    class is another, its forward was replaced, or its sublayers do not give what it gives."""
    check_one_device(model)
    config: Any = model.config
    for layout in layouts:
        check_layers(list(layout.list_of(model)[2]))
    if config.model_type in BACKBONES:  # a guessed layout has already been checked against every layer
        for layout in layouts:
            check_classes(list(layout.list_of(model)[2]))
    for layout in layouts:
        for layer in layout.list_of(model)[2]:
            check_forwards(layer, present(layer, layout.in_part))
    if config.model_type in BACKBONES:
        check_held(model, layouts)


def check_in_tiles(model: nn.Module, layout: Layout, *, reversible: bool) -> None:
    """Raises UserError for replaced forwards, and warns of hooks, on modules that will not be called as a whole: those
    of a feed-forward that runs in tiles and, where `reversible`, whole layers, which run by their sublayers."""
    shells = layout.shells[0] + layout.shells[1] if reversible else layout.shells[1]
    layers = list(layout.list_of(model)[2])
    for layer in layers:
        check_not_replaced(layer, shells)
        check_tokens_alone(layer, layout.feed_forward, layout.hidden_size(model.config))
    hooked_layers = [index for index, layer in enumerate(layers) if hooked(layer, (*[""][:reversible], *shells))]
    if hooked_layers:
        what = f"hooks on {len(hooked_layers)} layers, the first of them layer {hooked_layers[0]}, will not be called"
        cure = "layers are run in parts here: hook their submodules, or the model"
        warnings.warn(f"{what}: {cure}", UserWarning, stacklevel=3)
