"""Layers made of residual sub-layers, by the names of their modules: BART, OPT, ViT, Llama and their sisters.

    post-norm: h = norm(h + work(h))        pre-norm: h = h + work(norm(h))

for attention, where there is one for cross-attention, and for the feed-forward. Shape suffixes as in layout.py;
S positions of an encoder.
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

    pre_norm: whether norms come before the work; "do_layer_norm_before": the layer says so (OPT).
    attention, projections, output: the attention module; its queries, keys, values; and its last projection.
    attention_norm, feed_forward_norm: the norms of the two sub-layers.
    attention_after, feed_forward_after: norms of what a sub-layer adds (Gemma); None: there is none.
    feed_forward: one module, or its modules in order, with dropout `activation_dropout` after the second.
    cross, cross_norm: the attention that reads an encoder's output, between the other two; None: there is none.
    dropout: attribute of the layer, a rate or a module, before every residual; absent: none.
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

    # --- the attention sublayer ---

    def attention_before(self, layer: nn.Module, h_BLD: Tensor) -> Tensor:
        """What attention reads: the normed h of a pre-norm layer."""
        if not self.is_pre_norm(layer):
            return h_BLD
        normed_BLD: Tensor = layer.get_submodule(self.attention_norm)(h_BLD)
        return normed_BLD

    def attention_core(
        self, layer: nn.Module, x_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention (B, L, E / parts) of what `attention_before` gave, without its output projection."""
        return self._attended(layer, self.attention, x_BLD, part, parts, _for_attention(args, kwargs))

    def cross_core(self, layer: nn.Module, h_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any) -> Tensor:
        """Both attentions of a decoder's layer: (B, L, E + D), the cross-attention without its output projection, and
        what it was asked with, which is its residual as well. Post-norm only; in one part, since cross-attention
        reads all heads of the first."""
        assert self.cross is not None
        names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        mask, encoded_BSD = given.pop("encoder_attention_mask", None), given.pop("encoder_hidden_states", None)
        if encoded_BSD is None:
            raise UserError(type(layer).__name__, "was called without an encoder's output", "call the whole model")
        o_BLE = self._attended(layer, self.attention, h_BLD, 0, 1, _for_attention((), given))
        u_BLD = self._first_tokens(layer, o_BLE, h_BLD)
        asked = _for_attention((), given | {"key_value_states": encoded_BSD, "attention_mask": mask})
        return torch.cat([self._attended(layer, self.cross, u_BLD, 0, 1, asked), u_BLD], -1)

    def _attended(
        self, layer: nn.Module, name: str, x_BLD: Tensor, part: int, parts: int, kwargs: dict[str, Any]
    ) -> Tensor:
        module = layer.get_submodule(name)
        unprojected = _without(module, self.output)
        if parts == 1:
            output_BLE: Tensor = unprojected(x_BLD, **kwargs)[0]
            return output_BLE
        # Queries, keys and values of a group of heads are rows of the projections; a module takes any number of heads.
        rows = {
            f"{projection}.{key}": value.chunk(parts)[part]
            for projection in self.projections
            for key, value in module.get_submodule(projection).named_parameters()
        }
        if hasattr(unprojected, "num_heads"):
            unprojected.num_heads = cast(int, unprojected.num_heads) // parts  # type: ignore[assignment]  # OPT counts on it
        output_BLE = functional_call(unprojected, rows, (x_BLD,), kwargs)[0]
        return output_BLE

    def attention_tokens(self, layer: nn.Module, o_BLE: Tensor, h_BLD: Tensor) -> Tensor:
        """What follows attention: its output projection, residual and norm."""
        return self._first_tokens(layer, o_BLE, h_BLD)

    def cross_tokens(self, layer: nn.Module, ou_BLX: Tensor, h_BLD: Tensor) -> Tensor:
        """What follows `cross_core`: the output projection of cross-attention, its residual and norm."""
        assert self.cross is not None
        assert self.cross_norm is not None
        o_BLE, u_BLD = ou_BLX.split([ou_BLX.shape[-1] - h_BLD.shape[-1], h_BLD.shape[-1]], -1)
        a_BLD = layer.get_submodule(f"{self.cross}.{self.output}")(o_BLE)
        result_BLD: Tensor = layer.get_submodule(self.cross_norm)(u_BLD + self._dropped(layer, a_BLD))
        return result_BLD

    def _first_tokens(self, layer: nn.Module, o_BLE: Tensor, h_BLD: Tensor) -> Tensor:
        a_BLD = layer.get_submodule(f"{self.attention}.{self.output}")(o_BLE)
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
        """The feed-forward with norm, adapters and residual."""
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
        """Put an adapter at a site; the layer runs by its sublayers from now on."""
        if ADAPTERS not in layer._modules:
            layer.add_module(ADAPTERS, nn.ModuleDict())
        layer.get_submodule(ADAPTERS).add_module(site.name.lower(), adapter)
        if name_of_forward(layer) not in vars(layer) or not _is_by_sublayers(layer):
            self.run_feed_forward_by(layer, partial(self.feed_forward_half, layer))

    def run_feed_forward_by(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """The layer runs by its sublayers, the second by `function`."""
        # On the instance, by a partial: it is copied and pickled with the layer.
        setattr(layer, name_of_forward(layer), partial(self._forward, layer, function))

    def _forward(
        self, layer: Any, function: Callable[[Tensor], Tensor], h_BLD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Stands for the `forward` of the layer's class, gradient checkpointing included."""
        if not _checkpoints_in_forward(layer):
            return self._by_sublayers(layer, function, h_BLD, *args, **kwargs)
        # Run again, the layer would fill its cache again: transformers takes it away as well.
        taken: dict[str, Any] = {"past_key_values": None, "layer_past": None, "use_cache": False}
        uncached = {name: taken.get(name, value) for name, value in kwargs.items()}
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

    def layout(self, layers: str, **said: Any) -> Layout:
        """The layout of a list of such layers; `said`: fields of it that are not as usual."""
        cross = self.cross is not None
        usual: dict[str, Any] = {
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
        return Layout(layers=layers, **(usual | said))


def _checkpoints_in_forward(layer: nn.Module) -> bool:
    """Whether transformers is asked to checkpoint the layer, and does so in the `forward` of its class (from 5.2x on;
    before, in `__call__`, which is still around whatever `forward` an instance has)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    asked = layer.training and getattr(layer, "gradient_checkpointing", False) is True
    return (
        asked and isinstance(layer, GradientCheckpointingLayer) and "__call__" not in vars(GradientCheckpointingLayer)
    )


def _is_by_sublayers(layer: nn.Module) -> bool:
    function = vars(layer)[name_of_forward(layer)]
    return isinstance(function, partial) and getattr(function.func, "__func__", None) is Names._forward


def _without(module: nn.Module, name: str) -> nn.Module:
    """The module with its submodule `name` doing nothing; parameters are shared, the module stays as it was."""
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
    """What a layer passes its attention: a mask may come by place."""
    return dict(zip(("attention_mask",), args, strict=False)) | kwargs


# Functions with names: a reversible model holds its layout, and torch.save pickles the whole model.


def hidden_size(config: Any) -> int:
    return int(config.hidden_size)


def one_group(config: Any) -> int:
    return 1


def key_heads(config: Any) -> int:
    """Heads of keys: with grouped queries, a group of heads needs at least one of them."""
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
