"""OPT: a pre-norm decoder; opt-350m is post-norm, and its embeddings are narrower than its layers."""

from __future__ import annotations

from typing import Any

from meftbench.backbones.residual import Names

_NAMES = Names(
    attention="self_attn",
    output="out_proj",
    attention_norm="self_attn_layer_norm",
    feed_forward=("fc1", "activation_fn", "fc2"),
    feed_forward_norm="final_layer_norm",
    pre_norm="do_layer_norm_before",
)


def _refuses(config: Any) -> str | None:
    if config.layerdrop:
        return "drops whole layers in training (layerdrop), which a stack of layers cannot; set it to 0"
    return None


OPT = _NAMES.layout("decoder.layers", refuses=_refuses)
