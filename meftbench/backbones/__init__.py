"""Where pre-trained models keep their layers, how these split into sublayers, and how models are built by name."""

from meftbench.backbones.find import checked_layouts, layouts_of
from meftbench.backbones.layout import Layout, Site, base_of
from meftbench.backbones.split import split_layouts

__all__ = ["Layout", "Site", "base_of", "checked_layouts", "layouts_of", "split_layouts"]
