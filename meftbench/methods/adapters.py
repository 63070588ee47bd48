"""The adapter baselines: each attaches bottleneck adapters at certain sites of every layer."""

from __future__ import annotations

from torch import nn

from meftbench.backbones import Site, split_layouts
from meftbench.catalogue.methods import Bottleneck
from meftbench.methods.applied import Applied, freeze_backbone, new_adapter


def apply_houlsby(model: nn.Module, settings: Bottleneck) -> Applied:
    """Houlsby et al. 2019, figure 2: an adapter after each sublayer, before its residual is added."""
    return _apply(model, settings, (Site.AFTER_ATTENTION, Site.AFTER_FEED_FORWARD))


def apply_pfeiffer(model: nn.Module, settings: Bottleneck) -> Applied:
    """Pfeiffer et al. 2021, figure 3: one adapter after the feed-forward's norm, and that norm once more."""
    return _apply(model, settings, (Site.BETWEEN_NORMS,))


def apply_parallel(model: nn.Module, settings: Bottleneck) -> Applied:
    """He et al. 2022, table 1: one adapter beside the feed-forward, which reads the same input."""
    return _apply(model, settings, (Site.BESIDE_FEED_FORWARD,))


def _apply(model: nn.Module, settings: Bottleneck, sites: tuple[Site, ...]) -> Applied:
    layouts = split_layouts(model)
    freeze_backbone(model)
    for layout in layouts:
        for layer in layout.list_of(model)[2]:
            for site in sites:
                layout.attach(layer, site, new_adapter(model, layout, settings))
    return Applied(model, layouts=layouts)
