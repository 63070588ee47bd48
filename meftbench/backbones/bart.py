"""BART: a post-norm encoder and a post-norm decoder with cross-attention, each a list of layers (docs/design.md 1).

Cross-attention is part of the attention sublayer of a decoder layer. Adapters at the sites of that sublayer read the
output of the self-attention, which comes first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meftbench.backbones.residual import Names

_ENCODER = Names(
    attention="self_attn",
    output="out_proj",
    attention_norm="self_attn_layer_norm",
    feed_forward=("fc1", "activation_fn", "fc2"),
    feed_forward_norm="final_layer_norm",
    pre_norm=False,
)
_DECODER = replace(_ENCODER, cross="encoder_attn", cross_norm="encoder_attn_layer_norm")


def _refuses(config: Any) -> str | None:
    if not config.is_encoder_decoder:
        return "is configured as a decoder alone; BART is supported as encoder and decoder"
    if config.encoder_layerdrop or config.decoder_layerdrop:
        return "drops whole layers in training (layerdrop), which a stack of layers cannot; set it to 0"
    return None


def _encoder_heads(config: Any) -> int:
    return int(config.encoder_attention_heads)


BART = (
    _ENCODER.layout("encoder.layers", refuses=_refuses, head_groups=_encoder_heads),
    _DECODER.layout("decoder.layers", refuses=_refuses),
)
