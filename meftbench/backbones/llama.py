"""Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3: pre-norm decoders with RMS norms, gated feed-forwards and rotary
positions. The model passes each layer a mask and positions, which differ between layers where some of them attend
within a sliding window."""

from __future__ import annotations

from dataclasses import replace

from meftbench.backbones.residual import Names, layer_types_differ

_NAMES = Names(
    attention="self_attn",
    attention_norm="input_layernorm",
    feed_forward="mlp",
    feed_forward_norm="post_attention_layernorm",
    pre_norm=True,
)
# In Gemma what a sublayer adds to the residual is normed as well.
_GEMMA_NAMES = replace(
    _NAMES,
    attention_after="post_attention_layernorm",
    feed_forward_norm="pre_feedforward_layernorm",
    feed_forward_after="post_feedforward_layernorm",
)

LLAMA = _NAMES.layout("layers", layers_differ=layer_types_differ)
GEMMA = _GEMMA_NAMES.layout("layers", layers_differ=layer_types_differ)
