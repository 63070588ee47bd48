"""A layout for a transformers model that has none: guessed from the names of its modules, then checked.

A guess's sublayers must give, for every layer of the model itself, what the layer gives: then MEFT with λ→0 starts at
the pre-trained model, and reversal, which asks for no more than the same function twice, is exact. Where none does, the
model is refused with what to write.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch import nn

from meftbench.backbones.bert import BERT
from meftbench.backbones.held import calls_of, holds
from meftbench.backbones.layout import Layout, base_of
from meftbench.backbones.residual import Names, layer_types_differ
from meftbench.backbones.trunk import parts_of
from meftbench.errors import UserError

_OUTPUTS = ("o_proj", "out_proj", "dense")
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def guessed_layout(model: nn.Module) -> Layout:
    """The layout of a model's only list of layers. Raises UserError where no guess holds."""
    path = _path_of_layers(model)
    layers = list(cast(nn.ModuleList, base_of(model).get_submodule(path)))
    calls = calls_of(model, layers)
    for guess in _guesses(path, layers[0]):
        if len(calls) == len(layers) and all(holds(guess, layer, calls[i]) for i, layer in enumerate(layers)):
            return guess
    raise _refusal(model)


def _refusal(model: nn.Module) -> UserError:
    name, config = type(model).__name__, cast(Any, model.config)
    if parts := parts_of(model):
        return UserError(name, f"consists of {len(parts)} models", f'name one: module="{parts[0]}"')
    model_type = str(config.model_type)
    cure = (
        f"write a layout (backbones/residual.py: Names(...).layout(...)) and an entry {model_type!r} in BACKBONES of "
        "catalogue/backbones.py, as CONTRIBUTING.md says"
    )
    return UserError(name, f"the layers of {model_type!r} do not split as those that are known", cure)


def _path_of_layers(model: nn.Module) -> str:
    """Where the list of layers is in the base model: the only ModuleList of two or more layers with attention."""
    found = [
        name
        for name, module in base_of(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _attention_of(module[0])
    ]
    if len(found) != 1:
        raise _refusal(model)
    return str(found[0])


def _attention_of(layer: nn.Module) -> tuple[str, tuple[str, str, str], str] | None:
    """Name of the attention module among a layer's children, its projections, its output."""
    if _is_bert(layer):
        return "attention.self", _PROJECTIONS[1], "dense"
    for name, child in layer.named_children():
        for projections, output in itertools.product(_PROJECTIONS, _OUTPUTS):
            if all(hasattr(child, part) for part in (*projections, output)):
                return name, projections, output
    return None


def _is_bert(layer: nn.Module) -> bool:
    return all(hasattr(layer, name) for name in ("attention", "intermediate", "output")) and hasattr(
        layer.attention, "self"
    )


def _guesses(path: str, layer: nn.Module) -> Iterator[Layout]:
    """Every way in which the children of a layer may be norms around attention and a feed-forward."""
    if _is_bert(layer):
        yield replace(BERT, layers=path)
        return
    attention = _attention_of(layer)
    assert attention is not None
    name, projections, output = attention
    norms = [n for n, child in layer.named_children() if "norm" in type(child).__name__.lower()]
    linear = [n for n, child in layer.named_children() if isinstance(child, nn.Linear)]
    wide: list[str | tuple[str, ...]] = [
        n
        for n, child in layer.named_children()
        if n != name and n not in norms and n not in linear and len(list(child.parameters()))
    ]
    if len(linear) == 2:
        activations = [n for n in ("activation_fn", "act", "activation", "act_fn") if hasattr(layer, n)]
        wide += [(linear[0], activation, linear[1]) for activation in activations]
    for feed_forward, (first, second) in itertools.product(wide, itertools.permutations(norms, 2)):
        for pre_norm, dropout in itertools.product((True, False), ("dropout", "no_dropout")):
            names = Names(
                attention=name,
                projections=projections,
                output=output,
                attention_norm=first,
                feed_forward=feed_forward,
                feed_forward_norm=second,
                pre_norm=pre_norm,
                dropout=dropout,
            )
            yield names.layout(path, layers_differ=layer_types_differ)
