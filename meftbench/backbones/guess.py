"""A layout for a transformers model whose type has none in the catalogue: guessed from the names of its modules, then
checked.

A guess is accepted only if for every layer of the model its sublayers, run one after the other, give what the layer
gives. Then MEFT with λ→0 starts at the pre-trained model. Reversal needs only that a sublayer is the same function each
time. Where no guess is accepted, the error says which layout the user has to write.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch import nn

from meftbench.backbones.bert import BERT
from meftbench.backbones.held import EXPECTED_ERRORS, calls_of, holds
from meftbench.backbones.layout import Layout, base_of
from meftbench.backbones.residual import Names, layer_types_differ
from meftbench.backbones.trunk import parts_of
from meftbench.errors import UserError

_OUTPUTS = ("o_proj", "out_proj", "dense")
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def guessed_layout(model: nn.Module) -> Layout:
    """The layout of a model's only list of layers. Raises UserError: there is not one list, or no guess is right."""
    path = _path_of_layers(model)
    layers = list(cast(nn.ModuleList, base_of(model).get_submodule(path)))
    try:
        calls = calls_of(model, layers)
    except EXPECTED_ERRORS:  # the model cannot be run on a few tokens, so there is nothing to compare with
        raise _refusal(model) from None
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
    """Dotted path of the list of layers in the base model: of the only ModuleList whose first module has attention.
    Raises UserError where there is none, or several."""
    paths = [
        name
        for name, module in base_of(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _attention_of(module[0])
    ]
    if len(paths) != 1:
        raise _refusal(model)
    return str(paths[0])


def _attention_of(layer: nn.Module) -> tuple[str, tuple[str, str, str], str] | None:
    """Names of a layer's attention module, of its query, key and value projections, and of its output projection; None:
    no child of the layer is known as attention."""
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
    """A layout for every way in which the children of a layer may be attention, a feed-forward and their norms."""
    if _is_bert(layer):
        yield replace(BERT, layers=path)
        return
    attention = _attention_of(layer)
    assert attention is not None
    name, projections, output = attention
    norms = [n for n, child in layer.named_children() if "norm" in type(child).__name__.lower()]
    linears = [n for n, child in layer.named_children() if isinstance(child, nn.Linear)]
    feed_forwards: list[str | tuple[str, ...]] = [
        n
        for n, child in layer.named_children()
        if n != name and n not in norms and n not in linears and len(list(child.parameters()))
    ]
    if len(linears) == 2:
        activations = [n for n in ("activation_fn", "act", "activation", "act_fn") if hasattr(layer, n)]
        feed_forwards += [(linears[0], activation, linears[1]) for activation in activations]
    for feed_forward, (first, second) in itertools.product(feed_forwards, itertools.permutations(norms, 2)):
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
