"""What is known of a backbone: where its layers are, how a layer splits into sublayers, where adapters are attached.

Layouts call and extend the modules of `transformers`; no modelling code is repeated. Adapters are submodules of a
layer, so the keys of the pre-trained weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn


class Site(Enum):
    """Where in a layer an adapter is attached; x is what the adapter reads."""

    AFTER_ATTENTION = "x = projected attention output, after dropout; added to x before the residual (Houlsby 2019)"
    AFTER_FEED_FORWARD = "x = feed-forward output, after dropout; added to x before the residual (Houlsby 2019)"
    BETWEEN_NORMS = (
        "x = the layer's output; added to what its last norm reads, which runs again (Pfeiffer 2021); in a pre-norm "
        "layer, which has no last norm: as AFTER_FEED_FORWARD"
    )
    BESIDE_ATTENTION_OUTPUT = "x = projected attention output; added before the residual and the norm (MEFT3)"
    BESIDE_FEED_FORWARD = "x = the input of the feed-forward; added to its output before the last norm (He 2022, MEFT)"


def _never(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Layout:
    """One list of layers of a backbone family, and how each layer splits into an attention and a feed-forward sublayer.

    Shapes: B samples, L positions, D hidden size, E width of what the output projection of attention reads.

    layers: dotted path from the base model to the list of layers.
    attach: (layer, site, adapter): puts an adapter, a module from (B, L, D) to (B, L, D), at a site of a layer.
    attention_before: (layer, h (B, L, D)) -> (B, L, D): what attention reads, such as the normed h of a pre-norm layer;
        None: it reads h itself.
    attention_core: (layer, what attention reads (B, L, D), part, parts, and whatever the model passes its layers beside
        h) -> (B, L, E / parts): attention without its output projection, for the heads of group `part` of `parts`.
    attention_tokens: (layer, o (B, L, E) of the core, h (B, L, D)) -> (B, L, D): the rest of the attention sublayer,
        residual and norm included.
    feed_forward: (layer, output of the attention sublayer (B, L, D)) -> (B, L, D): the feed-forward sublayer.
        Only the core mixes tokens; the other functions treat each token alone.
    hidden_size, activation: (configuration) -> D, the name of the activation function.
    head_groups: (configuration) -> the largest number of groups of heads that the core can be run for; any divisor of
        it is possible as well.
    run_feed_forward_by: (layer, function of h (B, L, D)): makes the layer run `function` as its feed-forward sublayer.
    input_readers: submodules of a layer that read the input of the core directly; a layer may lack some of them.
    attention_targets: names of the projections that LoRA adapts by default.
    refuses: (configuration) -> why its model cannot be run by sublayers, or None.
    in_part: submodules of a layer that the core runs without their output projection; a layer may lack some of them.
    shells: submodules whose own forward is left out, since only their submodules are called: first those of the
        attention sublayer where it runs by itself, then those of the feed-forward sublayer.
    layers_differ: (configuration) -> whether the model passes its layers different masks or positions.
    """

    layers: str
    attach: Callable[[nn.Module, Site, nn.Module], None]
    attention_core: Callable[..., Tensor]
    attention_tokens: Callable[[nn.Module, Tensor, Tensor], Tensor]
    feed_forward: Callable[[nn.Module, Tensor], Tensor]
    hidden_size: Callable[[Any], int]
    head_groups: Callable[[Any], int]
    activation: Callable[[Any], str]
    run_feed_forward_by: Callable[[nn.Module, Callable[[Tensor], Tensor]], None]
    input_readers: tuple[str, ...]
    attention_targets: tuple[str, ...]
    refuses: Callable[[Any], str | None]
    attention_before: Callable[[nn.Module, Tensor], Tensor] | None = None
    in_part: tuple[str, ...] = ()
    shells: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    layers_differ: Callable[[Any], bool] = _never

    def attention(self, layer: nn.Module, h_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The attention sublayer (B, L, D): the layer is feed_forward(attention(h))."""
        input_BLD = h_BLD if self.attention_before is None else self.attention_before(layer, h_BLD)
        return self.attention_tokens(layer, self.attention_core(layer, input_BLD, 0, 1, *args, **kwargs), h_BLD)

    def list_of(self, model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
        """The module that owns the layers, the name it has for them, and the list."""
        path, _, name = self.layers.rpartition(".")
        owner = base_of(model).get_submodule(path)
        layers = getattr(owner, name)
        assert isinstance(layers, nn.ModuleList)
        return owner, name, layers


def present(layer: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the submodules called `names` that the layer has."""
    submodules = {name for name, _ in layer.named_modules()}
    return tuple(name for name in names if name in submodules)


def base_of(model: nn.Module) -> nn.Module:
    """The pre-trained part of a transformers model, without the task head; the model itself where it has no head."""
    base: nn.Module = getattr(model, str(model.base_model_prefix), model)
    return base
