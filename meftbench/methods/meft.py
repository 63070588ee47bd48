"""MEFT1, MEFT2, MEFT3 (Liao, Tan, Monz, NeurIPS 2023, section 3; docs/design.md 1, 2).

A variant is an entry of VARIANTS below: what F and G are, which of the two factors is near zero, whether the streams
are swapped, and which stream carries the last layer's output.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meftbench.backbones import Layout, Site, base_of, split_layouts
from meftbench.backbones.layout import present
from meftbench.backbones.quantize import is_quantized
from meftbench.backbones.split import check_in_tiles
from meftbench.catalogue.methods import Meft, Reversible
from meftbench.errors import UserError
from meftbench.methods.applied import (
    LAYER_OUTPUTS,
    Applied,
    freeze_backbone,
    new_adapter,
    predicts_tokens,
    refuse_asked,
)
from meftbench.methods.router_logits import pass_router_logits_on
from meftbench.reversible import Arithmetic, Block, Coupling, FixedPoint, Float, Relay, ReversibleStack, SubLayer, fork


def _attention_core(block: Any, h_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any) -> Tensor:
    return _layout(block).attention_core(block.layer, h_BLD, part, parts, *args, **kwargs)


def _attention_tokens(block: Any, o_1TE: Tensor, h_1TD: Tensor) -> Tensor:
    return _layout(block).attention_tokens(block.layer, o_1TE, h_1TD)


def _feed_forward_tokens(block: Any, o: None, h_1TD: Tensor) -> Tensor:
    return _layout(block).feed_forward(block.layer, h_1TD)


def _layer_tokens(block: Any, o_1TE: Tensor, h_1TD: Tensor) -> Tensor:
    return _feed_forward_tokens(block, None, _attention_tokens(block, o_1TE, h_1TD))


def _adapter_tokens(block: Any, o: None, h_1TD: Tensor) -> Tensor:
    output_1TD: Tensor = block.adapter(h_1TD)
    return output_1TD


def _normed_adapter_tokens(block: Any, o: None, h_1TD: Tensor) -> Tensor:
    return _adapter_tokens(block, o, _attention_before(block, h_1TD))


def _attention_before(block: Any, h_1TD: Tensor) -> Tensor:
    layout = _layout(block)
    assert layout.attention_before is not None
    return layout.attention_before(block.layer, h_1TD)


def _layout(block: Any) -> Layout:
    layout: Layout = block.layout
    return layout


# Number of tiles from which attention runs in groups of heads, if `head_groups` is auto. With fewer tiles a single tile
# takes more memory than attention, and groups of heads would save nothing.
PARTED_FROM = 8

WHOLE_LAYER = SubLayer(_attention_core, _layer_tokens)
_ATTENTION = SubLayer(_attention_core, _attention_tokens)
_FEED_FORWARD = SubLayer(None, _feed_forward_tokens)
_ADAPTER = SubLayer(None, _adapter_tokens)
# The residual stream of a language model has values of 20,000 in single channels. An adapter that read them without a
# norm would spread them to every channel.
_NORMED_ADAPTER = SubLayer(None, _normed_adapter_tokens)


@dataclass(frozen=True)
class Variant:
    """What distinguishes one variant of MEFT from the others.

    f, g: the two sublayers.  factors: the paper's (λ, β).
    small: for λ and for β, whether it is near zero; the `centred` setting applies to the couplings of such factors.
    sites: where adapters are attached inside the pre-trained layer.  own_adapter: F or G is an adapter by itself.
    swap: whether the streams are swapped after each block.
    carrier: the stream, 0 or 1, that carries the last layer's output.
    """

    f: SubLayer
    g: SubLayer
    factors: tuple[float, float]
    small: tuple[bool, bool]
    sites: tuple[Site, ...]
    own_adapter: bool
    swap: bool
    carrier: int


VARIANTS: dict[str, Variant] = {
    "meft1": Variant(
        WHOLE_LAYER,
        _ADAPTER,
        (0.1, 1.0),
        (True, False),
        (Site.BESIDE_FEED_FORWARD,),
        own_adapter=True,
        swap=True,
        carrier=0,
    ),
    "meft2": Variant(
        _ADAPTER,
        WHOLE_LAYER,
        (1.0, 0.1),
        (False, True),
        (Site.BESIDE_FEED_FORWARD,),
        own_adapter=True,
        swap=True,
        carrier=1,
    ),
    "meft3": Variant(
        _ATTENTION,
        _FEED_FORWARD,
        (0.1, 0.1),
        (True, True),
        (Site.BESIDE_ATTENTION_OUTPUT, Site.BESIDE_FEED_FORWARD),
        own_adapter=False,
        swap=False,
        carrier=1,
    ),
}


@dataclass(frozen=True)
class Arrangement:
    """How the layers of a model become the blocks of a reversible stack.

    f, g: the sublayers of a block; g None: a block replaces one stream only.
    couplings: of F and, where there is one, of G.  start: that of F in the first block, where it is another.
    sites, own_adapter, swap, carrier: as in `Variant`.  output: which stream, or their mean, is the result.
    """

    f: SubLayer
    g: SubLayer | None
    couplings: tuple[Coupling, ...]
    start: Coupling | None
    sites: tuple[Site, ...]
    own_adapter: bool
    swap: bool
    carrier: int
    output: Literal["mean", "last"]


def arithmetic_of(settings: Reversible) -> Arithmetic:
    """How the streams are represented: floating point as published, or fixed point."""
    if settings.arithmetic == "float":
        return Float()
    steps = {} if settings.step_bits == "auto" else {"step_bits": settings.step_bits}
    return FixedPoint(**steps, wide=settings.stream_bits == 64)


def apply_meft1(model: nn.Module, settings: Meft) -> Applied:
    """F is the whole layer with a parallel adapter, G an adapter; λ→0, β=1; streams swapped."""
    return reverse_layers(model, settings, _arranged(VARIANTS["meft1"], settings))


def apply_meft2(model: nn.Module, settings: Meft) -> Applied:
    """F is an adapter, G the whole layer with a parallel adapter; λ=1, β→0; streams swapped."""
    return reverse_layers(model, settings, _arranged(VARIANTS["meft2"], settings))


def apply_meft3(model: nn.Module, settings: Meft) -> Applied:
    """F is the attention sublayer, G the feed-forward sublayer, with an adapter in each; λ=β→0; not swapped."""
    return reverse_layers(model, settings, _arranged(VARIANTS["meft3"], settings))


def _arranged(variant: Variant, settings: Meft) -> Arrangement:
    normed = settings.adapter_input == "normed"
    f, g = (_NORMED_ADAPTER if normed and sublayer is _ADAPTER else sublayer for sublayer in (variant.f, variant.g))
    return Arrangement(
        f,
        g,
        _couplings(settings, variant),
        None,
        variant.sites,
        variant.own_adapter,
        variant.swap,
        variant.carrier,
        settings.output,
    )


def reverse_layers(model: nn.Module, settings: Reversible, arrangement: Arrangement) -> Applied:
    """`model`, whose layers are frozen and get adapters, and are replaced by reversible stacks.

    Raises UserError: the settings do not fit the model's layers, or it has no layout.
    """
    layouts = split_layouts(model)
    split = [_split(list(layout.list_of(model)[2]), settings) for layout in layouts]
    for layout in layouts:
        check_in_tiles(model, layout, reversible=True)
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        what = "gradient checkpointing, which is on, makes backward keep the gradient of the embeddings as well"
        cure = "model.gradient_checkpointing_disable() first: reversible layers are not checkpointed"
        warnings.warn(f"{what}: {cure}", UserWarning, stacklevel=2)
    freeze_backbone(model)
    stacks = [
        _replace_by_stack(model, layout, settings, arrangement, *layers, topmost=layout is layouts[-1])
        for layout, layers in zip(layouts, split, strict=True)
    ]
    pass_router_logits_on(model)
    owners = [layout.list_of(model)[0] for layout in layouts]
    for module in dict.fromkeys([base_of(model), *owners]):  # generation calls an encoder on its own
        module.register_forward_pre_hook(_without_layer_outputs, with_kwargs=True)
        module.register_forward_pre_hook(_without_cache, with_kwargs=True)

    @contextmanager
    def cached() -> Iterator[None]:
        previous = [stack.activations for stack in stacks]
        for stack in stacks:
            stack.activations = "cache"
        try:
            yield
        finally:
            for stack, activations in zip(stacks, previous, strict=True):
                stack.activations = activations

    return Applied(model, reference_switches=[cached], recomputes=True, layouts=layouts)


def _replace_by_stack(
    model: nn.Module,
    layout: Layout,
    settings: Reversible,
    arrangement: Arrangement,
    reversible: list[nn.Module],
    below: list[nn.Module],
    above: list[nn.Module],
    *,
    topmost: bool,
) -> ReversibleStack:
    """Replace the reversible layers of the model by a ReversibleStack, and return the stack.

    below, above: the ordinary layers that stay in the list.  topmost: no other stack reads this one's output.
    """
    adapted = [*reversible, *(below + above if settings.remaining == "adapted" else [])]
    for layer in adapted:
        for site in arrangement.sites:
            layout.attach(layer, site, new_adapter(model, layout, settings))
    sublayers = _sublayers(layout, arrangement)
    stack = ReversibleStack(
        (_block(model, layer, layout, settings, sublayers, arrangement.own_adapter) for layer in reversible),
        *arrangement.couplings,
        start=arrangement.start,
        swap=arrangement.swap,
        carrier=arrangement.carrier,
        output=arrangement.output,
        tiles=settings.tiles,
        parts=_head_groups(1 if is_quantized(model) else layout.head_groups(model.config), settings.head_groups),
        parts_from=PARTED_FROM if settings.head_groups == "auto" else 0,
        strict=settings.strict,
        first_layer=len(below),
        calibrated=settings.arithmetic == "exact" and settings.step_bits == "auto",
        keep_last=topmost and not above and not predicts_tokens(model),
    )
    if arrangement.output == "last" and arrangement.own_adapter and arrangement.carrier == 0:
        # The last block's second sublayer writes the stream that is not returned: its adapter would get no gradient.
        stack.blocks[-1].get_submodule("adapter").requires_grad_(False)
    owner, name, _ = layout.list_of(model)
    relays = [Relay(n, stack) for n in range(len(reversible) - 1)] if layout.layers_differ(model.config) else []
    setattr(owner, name, nn.ModuleList([*below, *relays, stack.train(model.training), *above]))
    return stack


def _sublayers(layout: Layout, arrangement: Arrangement) -> list[SubLayer]:
    """F and, where there is one, G, with a pre-norm before attention where the layout has one."""
    sublayers = [sublayer for sublayer in (arrangement.f, arrangement.g) if sublayer is not None]
    if layout.attention_before is None:
        return [_ADAPTER if sublayer is _NORMED_ADAPTER else sublayer for sublayer in sublayers]
    return [replace(sublayer, before=_attention_before) if sublayer.core else sublayer for sublayer in sublayers]


def _without_layer_outputs(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # transformers collects these outputs by hooks on the layers, which a reversible stack does not call.
    what, cure = (
        "a reversible model does not keep what its layers give",
        "take last_hidden_state, or ask the pre-trained model",
    )
    refuse_asked(base, kwargs, LAYER_OUTPUTS, what, cure)


def _without_cache(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # With gradients, the backward pass runs attention again, which would write to a cache a second time.
    if not torch.is_grad_enabled():
        return None
    if kwargs.get("past_key_values") is not None:
        what = "a reversible model, whose layers run again in backward, can neither fill nor read a cache"
        raise UserError("past_key_values", what, "pass none in training, or call the model under torch.no_grad()")
    # Switch the cache off, as transformers does under gradient checkpointing.
    return (args, kwargs | {"use_cache": False}) if getattr(base.config, "use_cache", False) else None


def _split(layers: list[nn.Module], settings: Reversible) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Return the reversible layers, the ordinary layers below them, and those above.

    Raises UserError: the settings ask for more layers than there are, or for frozen layers above trained ones.
    """
    count = len(layers) if settings.reversible_layers == "all" else settings.reversible_layers
    if not 1 <= count <= len(layers):
        cure = f"write all, or a number from 1 to {len(layers)}"
        raise UserError("reversible_layers", f"{count} of {len(layers)} layers", cure)
    if settings.remaining == "frozen" and settings.reversible_at == "bottom" and count < len(layers):
        cure = "use remaining: adapted, or reversible_at: top"
        raise UserError("remaining", "frozen layers above trained ones save nothing", cure)
    if settings.reversible_at == "top":
        return layers[len(layers) - count :], layers[: len(layers) - count], []
    return layers[:count], [], layers[count:]


def _block(
    model: nn.Module,
    layer: nn.Module,
    layout: Layout,
    settings: Reversible,
    sublayers: list[SubLayer],
    own_adapter: bool,
) -> Block:
    for name in present(layer, layout.input_readers):
        layer.get_submodule(name).register_forward_pre_hook(fork)
    parts = {"layer": layer}
    if own_adapter:
        parts["adapter"] = new_adapter(model, layout, settings)
    block = Block(parts, *sublayers)
    block.layout = layout  # type: ignore[assignment]
    return block


def _head_groups(heads: int, requested: int | Literal["auto"]) -> int:
    """Number of groups of heads in which attention is run. More groups hold less memory and launch more kernels.

    heads: the largest possible number.  Raises UserError: `requested` does not divide it.
    """
    if requested == "auto":
        return next(groups for groups in (4, 3, 2, 1) if heads % groups == 0)
    if heads % requested:
        what = f"{requested} does not divide {heads} heads" if heads > 1 else "attention cannot be cut into groups here"
        raise UserError("head_groups", what, f"write a divisor of {heads}, or auto")
    return requested


def _couplings(settings: Meft, variant: Variant) -> tuple[Coupling, Coupling]:
    arithmetic, couplings = arithmetic_of(settings), []
    for published, small, setting in zip(
        variant.factors, variant.small, (settings.lambda_, settings.beta), strict=True
    ):
        factor = (settings.small_factor(published) if small else published) if setting is None else setting
        couplings.append(Coupling(arithmetic, factor, int(settings.coupling == "centred" and small)))
    return couplings[0], couplings[1]
