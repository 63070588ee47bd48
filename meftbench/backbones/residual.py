"""Layers that consist of residual sublayers, described by the names of their modules: BART, OPT, ViT, Llama and others.

    post-norm: h = norm(h + work(h))        pre-norm: h = h + work(norm(h))

where `work` is attention, then cross-attention if the layer has it, then the feed-forward. Shape suffixes as in
layout.py; S: positions of an encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from meftbench.backbones.layout import Layout, Site
from meftbench.backbones.patched import name_of_forward, take_forwards
from meftbench.errors import UserError

ADAPTERS = "meft_adapters"


@dataclass(frozen=True)
class Names:
    """What the parts of a layer are called.

    pre_norm: whether the layer is pre-norm; a text: the layer's attribute of this name says so (OPT).
    attention, projections, output: the attention module; its query, key and value projections; its output projection.
    attention_norm, feed_forward_norm: the norms of the two sublayers.
    attention_after, feed_forward_after: norms of what a sublayer adds to the residual (Gemma); None: there are none.
    feed_forward: one module, or several in their order, with the layer's `activation_dropout` after the second.
    cross, cross_norm: cross-attention, which comes after attention, and its norm; None: there is none.
    dropout: the layer's attribute with the dropout before every residual, a probability or a module; where the layer
        has no such attribute, there is no dropout.
    """

    attention: str
    attention_norm: str
    feed_forward: str | tuple[str, ...]
    feed_forward_norm: str
    pre_norm: bool | str
    output: str = "o_proj"
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    attention_after: str | None = None
    feed_forward_after: str | None = None
    cross: str | None = None
    cross_norm: str | None = None
    dropout: str = "dropout"

    def is_pre_norm(self, layer: Any) -> bool:
        return bool(getattr(layer, self.pre_norm)) if isinstance(self.pre_norm, str) else self.pre_norm

    def projection_of(self, layer: nn.Module) -> str:
        """The name of the layer's output projection of attention."""
        return f"{self.attention}.{self.output}"

    # --- the attention sublayer ---

    def attention_before(self, layer: nn.Module, h_BLD: Tensor) -> Tensor:
        """What attention reads: the normed h in a pre-norm layer, else h."""
        if not self.is_pre_norm(layer):
            return h_BLD
        normed_BLD: Tensor = layer.get_submodule(self.attention_norm)(h_BLD)
        return normed_BLD

    def attention_core(
        self, layer: nn.Module, x_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention, without its output projection, of what `attention_before` gave: (B, L, E / parts)."""
        return self._unprojected_attention(layer, self.attention, x_BLD, part, parts, _for_attention(args, kwargs))

    def cross_core(self, layer: nn.Module, h_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any) -> Tensor:
        """Both attentions of a decoder layer: (B, L, E + D), cross-attention without its output projection (E), and
        beside it what its queries are computed from, which is also its residual (D). For post-norm layers only, and in
        one part only, since cross-attention reads all heads of the self-attention.

        Raises UserError: the layer is called without an encoder's output."""
        assert self.cross is not None
        names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        mask, encoded_BSD = arguments.pop("encoder_attention_mask", None), arguments.pop("encoder_hidden_states", None)
        if encoded_BSD is None:
            raise UserError(type(layer).__name__, "was called without an encoder's output", "call the whole model")
        o_BLE = self._unprojected_attention(layer, self.attention, h_BLD, 0, 1, _for_attention((), arguments))
        u_BLD = self._after_attention(layer, o_BLE, h_BLD)
        cross_arguments = _for_attention((), arguments | {"key_value_states": encoded_BSD, "attention_mask": mask})
        return torch.cat([self._unprojected_attention(layer, self.cross, u_BLD, 0, 1, cross_arguments), u_BLD], -1)

    def _unprojected_attention(
        self, layer: nn.Module, name: str, x_BLD: Tensor, part: int, parts: int, kwargs: dict[str, Any]
    ) -> Tensor:
        module = layer.get_submodule(name)
        unprojected = without(module, self.output)
        if parts == 1:
            output_BLE: Tensor = unprojected(x_BLD, **kwargs)[0]
            return output_BLE
        # The queries, keys and values of a group of heads come from consecutive rows of the projections. The module
        # works for any number of heads, so it can be called with the rows of one group.
        rows = {
            f"{projection}.{key}": value.chunk(parts)[part]
            for projection in self.projections
            for key, value in module.get_submodule(projection).named_parameters()
        }
        if hasattr(unprojected, "num_heads"):  # OPT splits its queries, keys and values into so many heads
            unprojected.num_heads = cast(int, unprojected.num_heads) // parts  # type: ignore[assignment]
        output_BLE = functional_call(unprojected, rows, (x_BLD,), kwargs)[0]
        return output_BLE

    def attention_tokens(self, layer: nn.Module, o_BLE: Tensor, h_BLD: Tensor) -> Tensor:
        """The rest of the attention sublayer: output projection, dropout, adapters, residual and norm."""
        return self._after_attention(layer, o_BLE, h_BLD)

    def cross_tokens(self, layer: nn.Module, ou_BLX: Tensor, h_BLD: Tensor) -> Tensor:
        """The rest of the attention sublayer after `cross_core`: the output projection of cross-attention, dropout,
        residual and norm."""
        assert self.cross is not None
        assert self.cross_norm is not None
        o_BLE, u_BLD = ou_BLX.split([ou_BLX.shape[-1] - h_BLD.shape[-1], h_BLD.shape[-1]], -1)
        a_BLD = layer.get_submodule(f"{self.cross}.{self.output}")(o_BLE)
        result_BLD: Tensor = layer.get_submodule(self.cross_norm)(u_BLD + self._dropped(layer, a_BLD))
        return result_BLD

    def _after_attention(self, layer: nn.Module, o_BLE: Tensor, h_BLD: Tensor) -> Tensor:
        a_BLD = layer.get_submodule(self.projection_of(layer))(o_BLE)
        if self.attention_after:
            a_BLD = layer.get_submodule(self.attention_after)(a_BLD)
        added_BLD = self._dropped(layer, a_BLD)
        if adapter := _adapter(layer, Site.AFTER_ATTENTION):
            added_BLD = added_BLD + adapter(added_BLD)
        if adapter := _adapter(layer, Site.BESIDE_ATTENTION_OUTPUT):
            added_BLD = added_BLD + adapter(a_BLD)
        result_BLD = h_BLD + added_BLD
        return result_BLD if self.is_pre_norm(layer) else layer.get_submodule(self.attention_norm)(result_BLD)

    # --- the feed-forward sublayer ---

    def feed_forward_half(self, layer: nn.Module, h_BLD: Tensor) -> Tensor:
        """The feed-forward sublayer, with norm, adapters and residual."""
        pre_norm = self.is_pre_norm(layer)
        norm = layer.get_submodule(self.feed_forward_norm)
        x_BLD = norm(h_BLD) if pre_norm else h_BLD
        f_BLD = self._fed_forward(layer, x_BLD)
        if self.feed_forward_after:
            f_BLD = layer.get_submodule(self.feed_forward_after)(f_BLD)
        added_BLD = self._dropped(layer, f_BLD)
        if adapter := _adapter(layer, Site.AFTER_FEED_FORWARD):
            added_BLD = added_BLD + adapter(added_BLD)
        if adapter := _adapter(layer, Site.BESIDE_FEED_FORWARD):
            added_BLD = added_BLD + adapter(x_BLD)
        adapter = _adapter(layer, Site.BETWEEN_NORMS)
        if pre_norm:
            result_BLD: Tensor = h_BLD + (added_BLD + adapter(added_BLD) if adapter else added_BLD)
            return result_BLD
        result_BLD = h_BLD + added_BLD
        if adapter:
            result_BLD = result_BLD + adapter(norm(result_BLD))
        return norm(result_BLD)  # type: ignore[no-any-return]

    def _fed_forward(self, layer: Any, x_BLD: Tensor) -> Tensor:
        if isinstance(self.feed_forward, str):
            return layer.get_submodule(self.feed_forward)(x_BLD)  # type: ignore[no-any-return]
        for place, name in enumerate(self.feed_forward):
            x_BLD = getattr(layer, name)(x_BLD)
            if place == 1:
                x_BLD = _dropped_at(layer, getattr(layer, "activation_dropout", 0.0), x_BLD)
        return x_BLD

    def _dropped(self, layer: nn.Module, x_BLD: Tensor) -> Tensor:
        return _dropped_at(layer, getattr(layer, self.dropout, 0.0), x_BLD)

    # --- adapters and tiles in layers that are not reversible ---

    def attach(self, layer: nn.Module, site: Site, adapter: nn.Module) -> None:
        """Put an adapter at a site of the layer, which runs by its sublayers from now on."""
        if ADAPTERS not in layer._modules:
            layer.add_module(ADAPTERS, nn.ModuleDict())
        layer.get_submodule(ADAPTERS).add_module(site.name.lower(), adapter)
        if name_of_forward(layer) not in vars(layer) or not _runs_by_sublayers(layer):
            self.run_feed_forward_by(layer, partial(self.feed_forward_half, layer))

    def run_feed_forward_by(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Make the layer run by its sublayers, with `function` for the feed-forward sublayer."""
        # A partial as attribute of the instance is copied and pickled together with the layer.
        setattr(layer, name_of_forward(layer), partial(self._forward, layer, function))

    def _forward(
        self, layer: Any, function: Callable[[Tensor], Tensor], h_BLD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Replaces the `forward` of the layer's class, and does its gradient checkpointing where that is turned on."""
        if not _checkpoints_in_forward(layer):
            return self._by_sublayers(layer, function, h_BLD, *args, **kwargs)
        # The layer runs again in the backward pass, and would fill the cache a second time. So the cache is left out,
        # as transformers does.
        without_cache: dict[str, Any] = {"past_key_values": None, "layer_past": None, "use_cache": False}
        uncached = {name: without_cache.get(name, value) for name, value in kwargs.items()}
        sublayers = partial(self._by_sublayers, layer, function, **uncached)
        output_BLD: Tensor = layer._gradient_checkpointing_func(sublayers, h_BLD, *args)
        return output_BLD

    def _by_sublayers(
        self, layer: nn.Module, function: Callable[[Tensor], Tensor], h_BLD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        core, tokens = (
            (self.cross_core, self.cross_tokens) if self.cross else (self.attention_core, self.attention_tokens)
        )
        o_BLE = core(layer, self.attention_before(layer, h_BLD), 0, 1, *args, **kwargs)
        return function(tokens(layer, o_BLE, h_BLD))

    def layout(self, layers: str, **fields: Any) -> Layout:
        """The layout of a list of such layers.

        layers: dotted path from the base model to the list.  fields: those of Layout that differ from `defaults`.
        """
        cross = self.cross is not None
        defaults: dict[str, Any] = {
            "attach": self.attach,
            "attention_before": None if self.pre_norm is False else self.attention_before,
            "attention_core": self.cross_core if cross else self.attention_core,
            "attention_tokens": self.cross_tokens if cross else self.attention_tokens,
            "feed_forward": self.feed_forward_half,
            "run_feed_forward_by": self.run_feed_forward_by,
            "in_part": (self.attention, *([self.cross] if self.cross else [])),
            "input_readers": tuple(f"{self.attention}.{name}" for name in self.projections),
            "attention_targets": (self.projections[0], self.projections[2]),
            "hidden_size": hidden_size,
            "head_groups": one_group if cross else key_heads,
            "activation": activation,
            "refuses": nothing,
        }
        return Layout(layers=layers, **(defaults | fields))


def _checkpoints_in_forward(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is turned on for the layer, and transformers does it in the `forward` of its class
    (from 5.2x on). Before, it does it in `__call__`, which also runs around a `forward` that was replaced."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    enabled = layer.training and getattr(layer, "gradient_checkpointing", False) is True
    return (
        enabled and isinstance(layer, GradientCheckpointingLayer) and "__call__" not in vars(GradientCheckpointingLayer)
    )


def _runs_by_sublayers(layer: nn.Module) -> bool:
    function = vars(layer)[name_of_forward(layer)]
    return isinstance(function, partial) and getattr(function.func, "__func__", None) is Names._forward


def without(module: nn.Module, name: str) -> nn.Module:
    """A shallow copy of the module in which the submodule `name` does nothing. It shares the module's parameters; the
    module itself is not changed."""
    view = copy.copy(module)
    view._modules = {**module._modules, name: nn.Identity()}
    take_forwards(view, module)
    return view


def _adapter(layer: nn.Module, site: Site) -> nn.Module | None:
    adapters = layer._modules.get(ADAPTERS)
    return None if adapters is None else adapters._modules.get(site.name.lower())


def _dropped_at(layer: nn.Module, dropout: float | nn.Module, x: Tensor) -> Tensor:
    if isinstance(dropout, nn.Module):
        return dropout(x)  # type: ignore[no-any-return]
    return F.dropout(x, dropout, layer.training) if dropout else x


def _for_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for attention, from those of its layer, whose mask may be positional."""
    return dict(zip(("attention_mask",), args, strict=False)) | kwargs


# Named functions rather than lambdas: a reversible model holds its layout, and torch.save pickles the whole model.


def hidden_size(config: Any) -> int:
    return int(config.hidden_size)


def one_group(config: Any) -> int:
    return 1


def key_heads(config: Any) -> int:
    """The number of key heads. With grouped-query attention, each group of heads needs at least one of them."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def activation(config: Any) -> str:
    for name in ("activation_function", "hidden_activation", "hidden_act"):
        if getattr(config, name, None):
            return str(getattr(config, name))
    raise UserError(type(config).__name__, "names no activation", "write activation: gelu (or another)")


def nothing(config: Any) -> None:
    return None


def layer_types_differ(config: Any) -> bool:
    return len(set(getattr(config, "layer_types", None) or ())) > 1
