"""BERT and RoBERTa: post-norm layers, LN(x + attention(x)) then LN(x + feed_forward(x))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from meftbench.backbones.layout import Layout, Site


def _attention_core(layer: Any, h_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any) -> Tensor:
    # args are (attention_mask, encoder_hidden_states); the second is always None, since decoders are refused.
    attention = layer.attention.self
    context = {name: value for name, value in kwargs.items() if not name.startswith("encoder_")}
    if parts == 1:
        output_BLE: Tensor = attention(h_BLD, *args[:1], **context)[0]
        return output_BLE
    # The queries, keys and values of a group of heads come from consecutive rows of the projections. The module works
    # for any number of heads, so it can be called with the rows of one group.
    rows = {name: parameter.chunk(parts)[part] for name, parameter in attention.named_parameters()}
    output_BLE = functional_call(attention, rows, (h_BLD, *args[:1]), context)[0]
    return output_BLE


def _attention_tokens(layer: Any, o_BLE: Tensor, h_BLD: Tensor) -> Tensor:
    output_BLD: Tensor = layer.attention.output(o_BLE, h_BLD)
    return output_BLD


def _feed_forward(layer: Any, h_BLD: Tensor) -> Tensor:
    """The computation of BertLayer.feed_forward_chunk, from its submodules. That method keeps the intermediate state,
    the widest tensor of the layer, in a local variable until the last norm is done."""
    output = layer.output
    projected_BLD = output.dropout(output.dense(layer.intermediate(h_BLD)))
    result_BLD: Tensor = output.LayerNorm(projected_BLD + _residual(output, h_BLD))
    return result_BLD


def _residual(output: Any, x_BLD: Tensor) -> Tensor:
    """What is added to the feed-forward's output: x, plus the output of the adapter beside the feed-forward, if any."""
    residual_BLD: Tensor = x_BLD + output.adapter(x_BLD) if "adapter" in output._modules else x_BLD
    return residual_BLD


# The hooks are plain functions that find their adapter through the module they are called on. So they still work after
# deepcopy and pickling, where a closure would refer to the adapter of the original model.


def _added_to_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result_BLD: Tensor = output + module.adapter(output)
    return result_BLD


def _added_beside_dropout(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result_BLD: Tensor = output + module.adapter(args[0])
    return result_BLD


def _added_to_residual(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # BertOutput is called with (intermediate, x) and computes LN(dropout(dense(intermediate)) + x).
    intermediate, x_BLD = args
    return intermediate, _residual(module, x_BLD)


def _added_to_normed(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x_BLD,) = args
    # `forward` is called directly, because calling the module would run this hook again.
    return (x_BLD + module.adapter(module.forward(x_BLD)),)


def _attach(layer: nn.Module, site: Site, adapter: nn.Module) -> None:
    place = {
        Site.AFTER_ATTENTION: "attention.output.dropout",
        Site.BESIDE_ATTENTION_OUTPUT: "attention.output.dropout",
        Site.AFTER_FEED_FORWARD: "output.dropout",
        Site.BESIDE_FEED_FORWARD: "output",
        Site.BETWEEN_NORMS: "output.LayerNorm",
    }[site]
    module = layer.get_submodule(place)
    module.add_module("adapter", adapter)
    if site in (Site.AFTER_ATTENTION, Site.AFTER_FEED_FORWARD):
        module.register_forward_hook(_added_to_output)
    elif site is Site.BESIDE_ATTENTION_OUTPUT:
        module.register_forward_hook(_added_beside_dropout)
    elif site is Site.BESIDE_FEED_FORWARD:
        module.register_forward_pre_hook(_added_to_residual)
    else:
        module.register_forward_pre_hook(_added_to_normed)


def _run_feed_forward_by(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    layer.feed_forward_chunk = function  # type: ignore[assignment]


def _refuses(config: Any) -> str | None:
    if config.is_decoder or config.add_cross_attention:
        return "is configured as a decoder; only encoders are supported"
    return None


def _hidden_size(config: Any) -> int:
    return int(config.hidden_size)


def _head_groups(config: Any) -> int:
    return int(config.num_attention_heads)


def _activation(config: Any) -> str:
    return str(config.hidden_act)


# All fields are named functions rather than lambdas: a reversible model holds its layout, and torch.save pickles the
# whole model.
BERT = Layout(
    layers="encoder.layer",
    attach=_attach,
    attention_core=_attention_core,
    attention_tokens=_attention_tokens,
    feed_forward=_feed_forward,
    hidden_size=_hidden_size,
    head_groups=_head_groups,
    activation=_activation,
    run_feed_forward_by=_run_feed_forward_by,
    input_readers=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    attention_targets=("query", "value"),
    refuses=_refuses,
    shells=(("attention",), ("output",)),
)
ROBERTA = BERT
