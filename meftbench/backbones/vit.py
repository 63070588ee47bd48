"""ViT and DeiT: pre-norm encoders of image patches; DeiT has a distillation token beside the class token."""

from __future__ import annotations

from meftbench.backbones.residual import Names

_NAMES = Names(
    attention="attention",
    attention_norm="layernorm_before",
    feed_forward="mlp",
    feed_forward_norm="layernorm_after",
    pre_norm=True,
)

VIT = _NAMES.layout("layers")
