"""Finds the transformers model in the module that a user gives: the module itself, or one inside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from meftbench.errors import UserError


@dataclass(frozen=True)
class Trunk:
    """The part of the user's module that a method is applied to.

    model: the transformers model; where there is none, the user's module.
    path: the dotted name of `model` in the user's module; empty where they are the same.
    """

    model: nn.Module
    path: str = ""

    def replaced_in(self, whole: nn.Module, by: nn.Module) -> nn.Module:
        """`whole` with `by` in the place of the trunk; `by` itself where the trunk is the whole."""
        if not self.path:
            return by
        replace(whole, self.model, by)
        return whole


def replace(whole: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old` in `whole`, under every name that `old` has there."""
    names = [name for name, module in whole.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        whole.set_submodule(name, new)


def trunk_of(whole: nn.Module, name: str | None = None) -> Trunk:
    """The transformers model in `whole` that a method is applied to.

    name: its dotted name in `whole`; None: the outermost one, of which there must not be several.

    Raises UserError: `whole` is no torch module, is a wrapper or has sharded parameters; `name` is not that of a
    transformers model; there are several and `name` is None.
    """
    if not isinstance(whole, nn.Module):
        raise UserError(
            "apply_method", f"the model is {type(whole).__name__}, no torch module", "give a torch.nn.Module"
        )
    where = type(whole).__name__
    _check_unwrapped(whole, where)
    inside = _outermost(whole)
    if name is not None:
        submodule = dict(whole.named_modules(remove_duplicate=False)).get(name)
        if not isinstance(submodule, PreTrainedModel):
            what = f"has no submodule {name!r}" if submodule is None else f"{name!r} is {type(submodule).__name__}"
            known = inside if any(inside) else parts_of(whole)
            cure = f"name a transformers model: {', '.join(known)}" if known else "there is none inside"
            raise UserError(f"{where}: module", what, cure)
        return Trunk(submodule, name)
    if len(inside) > 1:
        cure = f'name one, module="{inside[0]}"'
        raise UserError(where, f"has {len(inside)} transformers models inside: {', '.join(inside)}", cure)
    return Trunk(whole.get_submodule(inside[0]), inside[0]) if inside else Trunk(whole)


def _outermost(whole: nn.Module) -> list[str]:
    """Dotted names of the transformers models in `whole` that are inside no other; [""]: `whole` is one itself."""
    names: list[str] = []
    for name, module in whole.named_modules():
        if isinstance(module, PreTrainedModel) and not any(
            outer == "" or name.startswith(f"{outer}.") for outer in names
        ):
            names.append(name)
    return names


def parts_of(model: nn.Module) -> list[str]:
    """Dotted names of the models that a transformers model is composed of, each with a model type of its own, such as
    an encoder and a decoder, or images and text. Empty where it is a single model, with or without a head."""
    types = {getattr(getattr(model, "config", None), "model_type", None)}
    names: list[str] = []
    for name, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        within = any(name.startswith(f"{outer}.") for outer in names)
        if name and not within and isinstance(module, PreTrainedModel) and kind not in types:
            names.append(name)
    return names


def _check_unwrapped(whole: nn.Module, where: str) -> None:
    """Raises UserError where `whole` is a wrapper, which has already registered the parameters or compiled the layers
    that a method replaces; or where its parameters are sharded."""
    children = [name for name, _ in whole.named_children()]
    if children in (["module"], ["_orig_mod"]) and any(isinstance(m, PreTrainedModel) for m in whole.modules()):
        what = f"is a wrapper around {type(whole.get_submodule(children[0])).__name__}"
        cure = f"give the model inside, model.{children[0]}, and wrap it afterwards"
        raise UserError(where, what, cure)
    if any(hasattr(parameter, "device_mesh") for parameter in whole.parameters()):
        raise UserError(where, "its parameters are sharded", "apply the method first, then shard the model")
