"""The rank at which LoRA trains as many parameters as a method with adapters, computed from a model's configuration.

Gradients and optimizer state grow with the number of trained parameters, so at small shapes a comparison of methods is
fair only where that number is equal. tests/plan/test_equal_parameters.py checks the formulas against models.
"""

from __future__ import annotations

from typing import Any

# The number of adapters that a method puts into each layer.
ADAPTERS_A_LAYER = {
    "houlsby": 2,
    "pfeiffer": 1,
    "parallel": 1,
    **{f"meft{n}{kind}": 2 for n in (1, 2, 3) for kind in ("", "-exact")},
    **dict.fromkeys(("bdia", "midpoint", "leapfrog"), 1),
}


def matching_rank(config: dict[str, Any], method: str = "meft1-exact", adapter_size: int = 64) -> int:
    """The `rank` with which `lora` on queries and values trains about as many parameters as `method`, heads excluded.

    config: the model's configuration.  adapter_size: the bottleneck dimension of the method's adapters.
    Raises KeyError: the method has no adapters in every layer, or the configuration lacks the sizes of its layers.
    """
    hidden = int(config.get("d_model") or config["hidden_size"])
    heads = int(config["num_attention_heads"]) if "num_attention_heads" in config else 1
    head_size = int(config.get("head_dim") or hidden // heads)
    queries, values = heads * head_size, int(config.get("num_key_value_heads") or heads) * head_size
    if config.get("is_encoder_decoder") or "decoder_layers" in config:
        # Each decoder layer has a second attention, over the encoder's output.
        layers = int(config["encoder_layers"]) + int(config["decoder_layers"])
        attentions = layers + int(config["decoder_layers"])
    else:
        layers = attentions = int(config["num_hidden_layers"])
    # meft1-exact returns the stream of the last layer's output (output: last). In the last block of a stack the adapter
    # that is a sublayer by itself writes the other stream: it would get no gradient, so it is not trained.
    stacks = 2 if config.get("is_encoder_decoder") or "decoder_layers" in config else 1
    untrained = stacks if method == "meft1-exact" else 0
    adapters = (layers * ADAPTERS_A_LAYER[method] - untrained) * (2 * hidden * adapter_size + adapter_size + hidden)
    if "linear_num_key_heads" in config:
        parameters_per_rank = _of_hybrid(config, hidden, queries, values)
    else:
        parameters_per_rank = attentions * ((hidden + queries) + (hidden + values))
    return max(1, round(adapters / parameters_per_rank))


def _of_hybrid(config: dict[str, Any], hidden: int, queries: int, values: int) -> int:
    """Parameters of LoRA for each rank where most layers have a delta net (Qwen3-Next, Qwen3.5) instead of attention.

    There the projection to queries, keys and values is adapted, which in Qwen3-Next gives the gate as well; attention's
    projection to queries gives a gate, too. Where the configuration names no kinds, every fourth layer has attention.
    """
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or ["full_attention" if n % 4 == 3 else "linear_attention" for n in range(layers)]
    attentions = kinds.count("full_attention")
    keys = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    of_values = int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"])
    gates = of_values if str(config.get("model_type", "")).startswith("qwen3_next") else 0
    delta_net = hidden + 2 * keys + of_values + gates
    return attentions * ((hidden + 2 * queries) + (hidden + values)) + (layers - attentions) * delta_net
