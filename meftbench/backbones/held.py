"""A layout held against the model's own layers: its sublayers must give, on a few tokens, what the layer gives.

A family's name says little: a field of the configuration may scale a residual, or put a norm where there was none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones.layout import Layout, base_of
from meftbench.backbones.patched import alike, treats_tokens_alone
from meftbench.backbones.quantize import is_quantized
from meftbench.errors import UserError

# h (B, L, D), and what else a model passes a layer.
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
_FAILS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, ImportError)
_HELD: set[str] = set()  # configurations whose layouts were found to hold


def check_held(model: nn.Module, layouts: tuple[Layout, ...]) -> None:
    """Raises UserError where the sublayers of a layer, run one after the other, are not the layer: once a
    configuration, and one layer of each kind.

    Nothing is told of weights without values (meta), not finite, or in four bits, which may not run before they are
    moved; nor of a model that cannot run where it is (attention kernels of another device).
    """
    like = next(model.parameters())
    asked = _configuration(model, like.dtype)
    if like.is_meta or is_quantized(model) or asked in _HELD:
        return
    for layout in layouts:
        layers = list(layout.list_of(model)[2])
        kinds = _kinds(model, layers)
        try:
            calls = calls_of(model, layers)
            own = {place: _own(layers[place], call) for place, call in calls.items() if place in kinds}
        except _FAILS:  # the model's own layers cannot run here: there is nothing to hold the sublayers against
            return
        if not all(bool(expected.isfinite().all()) for expected in own.values()):
            return  # of weights that are NaN or infinite everything differs, from itself as well
        for place, expected in own.items():
            if not holds(layout, layers[place], calls[place], expected):
                kind = type(layers[place]).__name__
                what = f"its sublayers, as the layout of {model.config.model_type!r} has them, are not the layer"  # type: ignore[union-attr]
                raise UserError(f"{kind} (layer {place})", what, "take lora, or write a layout for such layers")
    _HELD.add(asked)


def _configuration(model: Any, dtype: torch.dtype) -> str:
    config = model.config
    said = json.dumps(config.to_dict(), sort_keys=True, default=str)
    # A class that is patched later is another.
    forwards = sorted({(kind.__name__, id(getattr(kind, "forward", None))) for kind in map(type, model.modules())})
    return f"{type(model).__name__} {dtype} {getattr(config, '_attn_implementation', None)} {said} {forwards}"


def check_layers(layers: list[nn.Module]) -> None:
    """Raises UserError where one layer stands in several places, or layers are wrapped: an adapter would be attached
    several times, and a wrapper left out."""
    if not layers:
        raise UserError("apply_method", "the model has no layers", "give one that has, or take method full")
    name = type(layers[0]).__name__
    if len({id(layer) for layer in layers}) < len(layers):
        what = "is in the model's list of layers several times, and would be given several adapters"
        raise UserError(name, what, "give each place a layer of its own (copy.deepcopy), or take lora")
    children = list(layers[0].children())
    if len(children) == 1 and len(list(children[0].children())) > 1:
        what = f"is a wrapper around {type(children[0]).__name__}, and layers are run here in parts"
        raise UserError(name, what, "apply the method first, then wrap the layers")


def _kinds(model: nn.Module, layers: list[nn.Module]) -> set[int]:
    """The first layer of each kind: by what the configuration says of it, and what it is made of."""
    said = getattr(model.config, "layer_types", None) or [None] * len(layers)
    first: dict[str, int] = {}
    for place, layer in enumerate(layers):
        made_of = sorted((name, type(module).__name__) for name, module in layer.named_modules())
        first.setdefault(f"{said[place] if place < len(said) else None} {made_of}", place)
    return set(first.values())


def calls_of(model: nn.Module, layers: list[nn.Module]) -> dict[int, Call]:
    """By a layer's place: what the model calls it with, on a few tokens or one image."""
    config: Any = model.config
    seen: dict[int, Call] = {}

    def note(place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = kwargs | {"past_key_values": None}
        h_BLD = args[0] if args else kwargs.pop("hidden_states")
        seen[place] = (h_BLD, args[1:], kwargs)

    like = next(model.parameters())
    if model.main_input_name == "pixel_values":
        shape = (1, config.num_channels, config.image_size, config.image_size)
        inputs = torch.zeros(shape, device=like.device, dtype=like.dtype)
    else:
        inputs = torch.arange(6, device=like.device)[None] % config.vocab_size
    handles = [layer.register_forward_pre_hook(partial(note, i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with undrawn(like.device), torch.no_grad():
            base_of(model)(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _own(layer: nn.Module, call: Call) -> Tensor:
    """What the layer itself gives, random numbers from a seed of 0."""
    h_BLD, args, kwargs = call
    with undrawn(h_BLD.device), torch.no_grad(), distinct_vectors(layer):
        torch.manual_seed(0)
        output = layer(h_BLD, *args, **kwargs)
    result_BLD: Tensor = output[0] if isinstance(output, tuple) else output
    return result_BLD


def holds(layout: Layout, layer: nn.Module, call: Call, expected: Tensor | None = None) -> bool:
    """Whether the sublayers give what the layer gives, random numbers and all, and treat each token alone.

    expected: what the layer gives, where it is known.
    """
    h_BLD, args, kwargs = call
    try:
        expected = _own(layer, call) if expected is None else expected
        with undrawn(h_BLD.device), torch.no_grad(), distinct_vectors(layer):
            torch.manual_seed(0)
            found = layout.feed_forward(layer, layout.attention(layer, h_BLD, *args, **kwargs))
            alone = treats_tokens_alone(layer, layout.feed_forward, h_BLD)
    except _FAILS:
        return False  # a wrong layout fails in any of these ways
    return alone and alike(found, expected)


@contextmanager
def distinct_vectors(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer's norms and biases are moved, each in a way of its own, the same in every call.

    Untrained ones are ones and zeros, so that a norm in the place of another, or none at all, would not be seen.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = [parameter for parameter in layer.parameters() if parameter.dim() == 1 and not parameter.is_meta]
    before = [vector.detach().clone() for vector in vectors]
    with torch.no_grad():
        for vector in vectors:
            drawn = torch.rand(vector.shape, generator=generator).to(vector.device, vector.dtype)
            vector.mul_(1 + drawn / 4).add_(drawn / 4)
    try:
        yield
    finally:
        with torch.no_grad():
            for vector, held in zip(vectors, before, strict=True):
                vector.copy_(held)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside, on the CPU and on `device`, are not drawn from what follows."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
