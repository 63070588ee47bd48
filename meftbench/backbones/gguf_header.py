"""Compares what the header of a GGUF file says of its model with what transformers made of it.

transformers reads the header keys that it knows and silently ignores others, a scaled rotary embedding among them; the
model then computes something else than the one in the file. A key is refused unless it is known here to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from meftbench.backbones.gguf_bounds import check_bounds
from meftbench.errors import UserError
from meftbench.plan.config_values import LARGEST_SIZE

# By header key, without the architecture's name: fields of the configuration, one of which must have the key's value.
# `own_head_size` and `own_rotary_size` are no fields: `_field` computes them.
FIELDS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim", "own_head_size"),
    "attention.value_length": ("head_dim", "own_head_size"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.dimension_count": ("rotary_dim", "own_rotary_size"),
    "rope.freq_base": ("rope_theta",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
# Keys that change nothing in the computation, with the values for which that is so; None: for any value.
HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "rope.scaling.type": ("none",),
    "attention.causal": (True,),
    "tensor_data_layout": None,
    "pooling_type": None,
}
ROPE_TENSORS = ("rope_freqs", "rope_factors")  # divisors of the rotary frequencies, for longer contexts
CURE = "name the model's folder or its name on the hub instead"


@dataclass(frozen=True)
class Header:
    """What is needed of a header.

    values: those of the keys that begin with the architecture's name, by key without that name.
    sizes: number of elements by tensor name.
    """

    architecture: str
    values: dict[str, Any]
    sizes: dict[str, int]


def read_header(name: str, file: Path) -> Header:
    """The header of a GGUF file; its weights are not read. name: what the user calls the model.

    Raises UserError: it says more than the file holds; and what the package gguf raises on a file that is damaged
    otherwise.
    """
    from gguf import GGUFReader

    check_bounds(name, file)
    reader = GGUFReader(str(file))
    architecture = str(reader.fields["general.architecture"].contents())
    prefix = f"{architecture}."
    values = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    header = Header(architecture, values, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors})
    _check_counts(name, header)
    return header


def _check_counts(name: str, header: Header) -> None:
    """Raises UserError: the header asks for more layers than there are tensors, or for a size that no model has.
    transformers would build such a model without end."""
    for key, value in header.values.items():
        most = len(header.sizes) if key == "block_count" else LARGEST_SIZE
        if type(value) is int and value > most and key.endswith(("_count", "_length", "_size")):
            what = f"its header has {header.architecture}.{key} = {_short(value)}, of at most {most:,}"
            raise UserError(name, what, "download or convert it again")


def completed(config: Any, header: Header) -> Any:
    """`config`, changed in place where transformers leaves a field at its default although the value is known.

    From the header: the size of a head (Qwen3), and that there is no sliding window (Mistral). The scale of Gemma's
    attention scores is in no header: it is the size of a head, except that the two models of 27 billion parameters use
    the hidden size divided by the number of heads.
    """
    values = header.values
    if "attention.key_length" in values and hasattr(config, "head_dim"):
        config.head_dim = int(values["attention.key_length"])
    gemma = config.model_type.startswith("gemma")
    if "attention.sliding_window" not in values and not gemma and getattr(config, "sliding_window", None):
        config.sliding_window = None
    if hasattr(config, "query_pre_attn_scalar"):
        is_27b = (config.model_type[:6], config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
        hidden_size_per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = hidden_size_per_head if is_27b else config.head_dim
    return config


def check_config(name: str, header: Header, config: Any) -> None:
    """Raises UserError: the header scales the rotary embedding, has a key that is not known here, or has a value that
    the configuration does not have."""
    for tensor in header.sizes:
        if tensor.startswith(ROPE_TENSORS):
            what = f"its rotary embedding is scaled ({tensor}), which transformers does not read from GGUF files"
            raise UserError(name, what, CURE)
    for key, value in header.values.items():
        if key in HARMLESS:
            allowed = HARMLESS[key]
            if allowed is None or value in allowed:
                continue
        if key == "rope.scaling.original_context_length" and value == header.values.get("context_length"):
            continue  # the same length as that of the model: the positions are not scaled
        if key not in FIELDS:
            what = f"its header has {header.architecture}.{key} = {_short(value)}, which is not read from GGUF files"
            raise UserError(name, what, CURE)
        configured = [setting for field in FIELDS[key] if (setting := _field(config, field)) is not None]
        if key == "context_length" and not configured:
            continue  # BLOOM and T5 have no table of positions, and so no such limit
        if not any(_same(value, setting) for setting in configured):
            read = (
                f"read as {_short(configured[0])}"
                if configured
                else f"of which {config.model_type} models have no setting"
            )
            raise UserError(name, f"its header has {header.architecture}.{key} = {_short(value)}, {read}", CURE)


def check_weights(name: str, header: Header, model: nn.Module, missing: set[str]) -> None:
    """Raises UserError: a weight of the model is not in the file, or a weight of the file is not in the model.

    missing: names of the model's weights that transformers did not find in the file.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if absent := sorted(missing - tied):
        what = f"{len(absent)} weights are not in the file, {absent[0]} among them"
        raise UserError(name, what, "convert the model again, or " + CURE)
    of_file = sum(header.sizes.values())
    of_model = sum(parameter.numel() for parameter in model.parameters())  # a tied weight counts once
    if of_file != of_model:
        what = (
            f"the file's {len(header.sizes)} tensors have {of_file:,} elements, the model made of them {of_model:,}: "
            "some, such as biases, are not read from GGUF files"
        )
        raise UserError(name, what, CURE)


def _field(config: Any, name: str) -> Any:
    """The value of a field of the configuration, or of a value computed from it; None: it has none."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name == "own_head_size":
        return head_size
    rope = getattr(config, "rope_parameters", None) or {}
    if name == "own_rotary_size":
        share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        return int(head_size * share)
    if name == "n_inner" and hasattr(config, name):
        return config.n_inner or 4 * config.hidden_size  # None in GPT-2's configuration means this product
    if name == "rope_theta":
        return rope.get(name, getattr(config, name, None))
    return getattr(config, name, None)


def _same(header_value: Any, setting: Any) -> bool:
    if isinstance(header_value, float) and isinstance(setting, int | float):
        return abs(header_value - setting) <= 1e-6 * abs(header_value)  # the header holds float32
    return bool(header_value == setting)


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 40 else f"{text[:37]}..."
