"""Which LoRA trains as many parameters as a method with adapters: closed formulas of a model's configuration.

Gradients and optimizer state grow with what is trained, so at small shapes two methods are compared fairly only where
that is equal. (tests/plan/test_equal_parameters.py holds the formulas against models.)
"""

from __future__ import annotations

from typing import Any

# Bottlenecks that a method puts into a layer.
ADAPTERS_A_LAYER = {
    "houlsby": 2,
    "pfeiffer": 1,
    "parallel": 1,
    **{f"meft{n}{kind}": 2 for n in (1, 2, 3) for kind in ("", "-exact")},
}


def matching_rank(config: dict[str, Any], method: str = "meft1-exact", adapter_size: int = 64) -> int:
    """The `rank` of `lora` on queries and values whose parameters are nearest to those of `method`, heads aside.

    config: the model's configuration.  adapter_size: of the method.
    Raises KeyError for a method without bottlenecks in every layer, or a configuration without the sizes of its layers.
    """
    hidden = int(config.get("d_model") or config["hidden_size"])
    heads = int(config["num_attention_heads"]) if "num_attention_heads" in config else 1
    head_size = int(config.get("head_dim") or hidden // heads)
    queries, values = heads * head_size, int(config.get("num_key_value_heads") or heads) * head_size
    if config.get("is_encoder_decoder") or "decoder_layers" in config:
        # A layer of a decoder has a second attention, over the encoder's output.
        layers = int(config["encoder_layers"]) + int(config["decoder_layers"])
        attentions = layers + int(config["decoder_layers"])
    else:
        layers = attentions = int(config["num_hidden_layers"])
    # The last block's own adapter of MEFT1 writes the stream that is not returned where the output is `last`.
    stacks = 2 if config.get("is_encoder_decoder") or "decoder_layers" in config else 1
    idle = stacks if method == "meft1-exact" else 0
    adapters = (layers * ADAPTERS_A_LAYER[method] - idle) * (2 * hidden * adapter_size + adapter_size + hidden)
    a_rank = attentions * ((hidden + queries) + (hidden + values))
    return max(1, round(adapters / a_rank))
