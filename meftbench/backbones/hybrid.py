"""Qwen3.5 and Qwen3-Next: pre-norm decoders in which three layers of four have a gated delta net in place of attention.

A gated delta net carries a state from token to token, but only within a sample and within a call: its layer is a
function of the layer's input, as one with attention is, and can be recomputed. It stands in the place of attention's
core, which runs on whole samples. Its heads do not see each other, so that it runs in groups of heads as well.

Shape suffixes as in layout.py. Source: Yang et al. 2025, Gated Delta Networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, cat, nn
from torch.func import functional_call

from meftbench.backbones.residual import Names, layer_types_differ, without

_DELTA_NET, _OUTPUT = "linear_attn", "out_proj"


@dataclass(frozen=True)
class HybridNames(Names):
    """Names of a layer that has attention or a gated delta net.

    mixed: the projection of a gated delta net that gives queries, keys and values (and, in Qwen3-Next, its gate).
    by_head: whether the rows of `mixed` are those of one head after the other; otherwise first come those of all
        queries, then those of all keys, then those of all values.
    """

    mixed: str = "in_proj_qkv"
    by_head: bool = False

    def projection_of(self, layer: nn.Module) -> str:
        return f"{_DELTA_NET}.{_OUTPUT}" if hasattr(layer, _DELTA_NET) else super().projection_of(layer)

    def attention_core(
        self, layer: nn.Module, x_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not hasattr(layer, _DELTA_NET):
            return super().attention_core(layer, x_BLD, part, parts, *args, **kwargs)
        module = layer.get_submodule(_DELTA_NET)
        unprojected: Any = without(module, _OUTPUT)
        arguments = {name: kwargs[name] for name in kwargs if name not in ("position_embeddings", "position_ids")}
        arguments["cache_params"] = arguments.pop("past_key_values", None)
        if parts == 1:
            return cast(Tensor, unprojected(x_BLD, **arguments))
        for name in ("num_k_heads", "num_v_heads", "key_dim", "value_dim"):
            setattr(unprojected, name, getattr(unprojected, name) // parts)
        return cast(Tensor, functional_call(unprojected, self._rows_of(module, part, parts), (x_BLD,), arguments))

    def _rows_of(self, module: Any, part: int, parts: int) -> dict[str, Tensor]:
        """The parameters of a gated delta net for a group of its heads, by name."""
        together = ("conv1d.", *(() if self.by_head else (f"{self.mixed}.",)))
        rows = {}
        for name, parameter in module.named_parameters():
            if name.startswith(together):
                of_each = parameter.split([module.key_dim, module.key_dim, module.value_dim])
                rows[name] = cat([rows_of_one.chunk(parts)[part] for rows_of_one in of_each])
            elif not name.startswith(("norm.", f"{_OUTPUT}.")):  # the norm is one for all heads
                rows[name] = parameter.chunk(parts)[part]
        return rows


def _key_heads(config: Any) -> int:
    """A divisor of both numbers of key heads: those of attention, and those of gated delta nets."""
    return math.gcd(int(config.num_key_value_heads), int(config.linear_num_key_heads))


def _hybrid(mixed: str, *, by_head: bool) -> Any:
    names = HybridNames(
        attention="self_attn",
        attention_norm="input_layernorm",
        feed_forward="mlp",
        feed_forward_norm="post_attention_layernorm",
        pre_norm=True,
        mixed=mixed,
        by_head=by_head,
    )
    return names.layout(
        "layers",
        layers_differ=layer_types_differ,
        head_groups=_key_heads,
        in_part=("self_attn", _DELTA_NET),
        # Not those of a gated delta net, which multiplies its input with the mask before they read it.
        input_readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_targets=("q_proj", "v_proj", mixed),
    )


QWEN3_5 = _hybrid("in_proj_qkv", by_head=False)
QWEN3_NEXT = _hybrid("in_proj_qkvz", by_head=True)
