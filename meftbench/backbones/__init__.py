"""Where pre-trained models keep their layers, and how they are built."""

from meftbench.backbones.layout import Layout, Site, layout_of

__all__ = ["Layout", "Site", "layout_of"]
