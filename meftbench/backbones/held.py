"""Checks a layout against the model's own layers: on a few tokens, the sublayers must give what the layer gives.

The model type alone does not guarantee that: a field of the configuration may scale a residual or add a norm.
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

# What a model calls a layer with: h (B, L, D), the other positional arguments, and the keyword arguments.
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
EXPECTED_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, ImportError)
_HELD: set[str] = set()  # models and configurations whose layouts have passed the check


def check_held(model: nn.Module, layouts: tuple[Layout, ...]) -> None:
    """Raises UserError where the sublayers of a layer, run one after the other, do not give what the layer gives.

    One layer of each kind is checked, and each configuration only once. The check is skipped where weights have no
    values (meta), are not finite, or are in four bits, since those may not run before they are moved to their device;
    and where the model cannot run on its present device (attention kernels of another one).
    """
    parameter = next(model.parameters())
    key = _configuration(model, parameter.dtype)
    if parameter.is_meta or is_quantized(model) or key in _HELD:
        return
    for layout in layouts:
        layers = list(layout.list_of(model)[2])
        kinds = _kinds(model, layers)
        try:
            calls = calls_of(model, layers)
            outputs = {index: _layer_output(layers[index], call) for index, call in calls.items() if index in kinds}
        except EXPECTED_ERRORS:  # the layers themselves cannot run here, so there is nothing to compare with
            return
        if not all(bool(expected.isfinite().all()) for expected in outputs.values()):
            return  # NaN and infinite values cannot be compared
        for index, expected in outputs.items():
            if not holds(layout, layers[index], calls[index], expected):
                kind = type(layers[index]).__name__
                what = (
                    f"its sublayers, as the layout of {model.config.model_type!r} "  # type: ignore[union-attr]
                    "has them, are not the layer"
                )
                raise UserError(f"{kind} (layer {index})", what, "take lora, or write a layout for such layers")
    _HELD.add(key)


def _configuration(model: Any, dtype: torch.dtype) -> str:
    """What the result of the check depends on, as a text: class, dtype, attention, configuration and forwards."""
    config = model.config
    fields = json.dumps(config.to_dict(), sort_keys=True, default=str)
    # With the identity of each forward, so that a class that is patched later is checked again.
    forwards = sorted({(kind.__name__, id(getattr(kind, "forward", None))) for kind in map(type, model.modules())})
    return f"{type(model).__name__} {dtype} {getattr(config, '_attn_implementation', None)} {fields} {forwards}"


def check_layers(layers: list[nn.Module]) -> None:
    """Raises UserError where there are no layers; where one layer is in several places of the list, and would be given
    several adapters; or where layers are wrapped, and the wrapper would be left out."""
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
    """The index of the first layer of each kind. A kind is the layer's entry in the configuration's `layer_types`
    together with the names and classes of its submodules."""
    layer_types = getattr(model.config, "layer_types", None) or [None] * len(layers)
    first: dict[str, int] = {}
    for index, layer in enumerate(layers):
        submodules = sorted((name, type(module).__name__) for name, module in layer.named_modules())
        first.setdefault(f"{layer_types[index] if index < len(layer_types) else None} {submodules}", index)
    return set(first.values())


def calls_of(model: nn.Module, layers: list[nn.Module]) -> dict[int, Call]:
    """By a layer's index: what the model calls it with, on six tokens or one image."""
    config: Any = model.config
    calls: dict[int, Call] = {}

    def note(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = kwargs | {"past_key_values": None}
        h_BLD = args[0] if args else kwargs.pop("hidden_states")
        calls[index] = (h_BLD, args[1:], kwargs)

    parameter = next(model.parameters())
    if model.main_input_name == "pixel_values":
        shape = (1, config.num_channels, config.image_size, config.image_size)
        inputs = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
    else:
        inputs = torch.arange(6, device=parameter.device)[None] % config.vocab_size
    handles = [layer.register_forward_pre_hook(partial(note, i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with undrawn(parameter.device), torch.no_grad():
            base_of(model)(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _layer_output(layer: nn.Module, call: Call) -> Tensor:
    """What the layer itself gives, with the random number generator at seed 0 and moved norms and biases."""
    h_BLD, args, kwargs = call
    with undrawn(h_BLD.device), torch.no_grad(), distinct_vectors(layer):
        torch.manual_seed(0)
        output = layer(h_BLD, *args, **kwargs)
    result_BLD: Tensor = output[0] if isinstance(output, tuple) else output
    return result_BLD


def holds(layout: Layout, layer: nn.Module, call: Call, expected: Tensor | None = None) -> bool:
    """Whether the sublayers give what the layer gives, with dropout drawn from the same seed, and the feed-forward
    sublayer treats each token alone.

    expected: what the layer gives; None: the layer is run to find out.
    """
    h_BLD, args, kwargs = call
    try:
        expected = _layer_output(layer, call) if expected is None else expected
        with undrawn(h_BLD.device), torch.no_grad(), distinct_vectors(layer):
            torch.manual_seed(0)
            output = layout.feed_forward(layer, layout.attention(layer, h_BLD, *args, **kwargs))
            alone = treats_tokens_alone(layer, layout.feed_forward, h_BLD)
    except EXPECTED_ERRORS:
        return False  # running a wrong layout may raise any of these
    return alone and alike(output, expected)


@contextmanager
def distinct_vectors(layer: nn.Module) -> Iterator[None]:
    """Within the context the layer's parameters of one dimension (norms and biases) have other values, different for
    each of them and the same in every call.

    Untrained norms and biases are ones and zeros, with which a norm that is exchanged or missing would not be noticed.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = [parameter for parameter in layer.parameters() if parameter.dim() == 1 and not parameter.is_meta]
    originals = [vector.detach().clone() for vector in vectors]
    with torch.no_grad():
        for vector in vectors:
            drawn = torch.rand(vector.shape, generator=generator).to(vector.device, vector.dtype)
            vector.mul_(1 + drawn / 4).add_(drawn / 4)
    try:
        yield
    finally:
        with torch.no_grad():
            for vector, original in zip(vectors, originals, strict=True):
                vector.copy_(original)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """The generators of random numbers of the CPU and of `device` are restored at the end of the context."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
