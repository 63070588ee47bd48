"""Which part of what a user gives is the transformers model: the module itself, or one inside a module of theirs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from meftbench.errors import UserError


@dataclass(frozen=True)
class Trunk:
    """model: the transformers model, or what was given where there is none inside.
    path: its dotted name in what was given; empty where it is what was given."""

    model: nn.Module
    path: str = ""

    def replaced_in(self, whole: nn.Module, by: nn.Module) -> nn.Module:
        """`whole` with `by` in the trunk's place; `by` where the trunk is the whole."""
        if not self.path:
            return by
        replace(whole, self.model, by)
        return whole


def replace(whole: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `old` is in `whole`, under all its names."""
    names = [name for name, module in whole.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        whole.set_submodule(name, new)


def trunk_of(whole: nn.Module, named: str | None = None) -> Trunk:
    """The transformers model that a method is applied to.

    named: its dotted name in `whole`; None: the outermost one, of which there must not be two.

    Raises UserError: no torch module; a wrapper, sharded parameters; a name that is no transformers model's; several.
    """
    if not isinstance(whole, nn.Module):
        raise UserError(
            "apply_method", f"the model is {type(whole).__name__}, no torch module", "give a torch.nn.Module"
        )
    where = type(whole).__name__
    _check_unwrapped(whole, where)
    inside = _outermost(whole)
    if named is not None:
        found = dict(whole.named_modules(remove_duplicate=False)).get(named)
        if not isinstance(found, PreTrainedModel):
            what = f"has no submodule {named!r}" if found is None else f"{named!r} is {type(found).__name__}"
            known = inside if any(inside) else parts_of(whole)
            cure = f"name a transformers model: {', '.join(known)}" if known else "there is none inside"
            raise UserError(f"{where}: module", what, cure)
        return Trunk(found, named)
    if len(inside) > 1:
        cure = f'name one, module="{inside[0]}"'
        raise UserError(where, f"has {len(inside)} transformers models inside: {', '.join(inside)}", cure)
    return Trunk(whole.get_submodule(inside[0]), inside[0]) if inside else Trunk(whole)


def _outermost(whole: nn.Module) -> list[str]:
    """Names of the transformers models in `whole` that are in no other; [""]: it is one itself."""
    found: list[str] = []
    for name, module in whole.named_modules():
        if isinstance(module, PreTrainedModel) and not any(
            outer == "" or name.startswith(f"{outer}.") for outer in found
        ):
            found.append(name)
    return found


def parts_of(model: nn.Module) -> list[str]:
    """Names of the models that a transformers model is put together from, each of a configuration of its own (an
    encoder and a decoder, images and text); none where it is one model, or a head on one."""
    types = {getattr(getattr(model, "config", None), "model_type", None)}
    found: list[str] = []
    for name, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        within = any(name.startswith(f"{outer}.") for outer in found)
        if name and not within and isinstance(module, PreTrainedModel) and kind not in types:
            found.append(name)
    return found


def _check_unwrapped(whole: nn.Module, where: str) -> None:
    """A wrapper has noted the parameters, or compiled the layers, that a method would replace."""
    children = [name for name, _ in whole.named_children()]
    if children in (["module"], ["_orig_mod"]) and any(isinstance(m, PreTrainedModel) for m in whole.modules()):
        what = f"is a wrapper around {type(whole.get_submodule(children[0])).__name__}"
        cure = f"give the model inside, model.{children[0]}, and wrap it afterwards"
        raise UserError(where, what, cure)
    if any(hasattr(parameter, "device_mesh") for parameter in whole.parameters()):
        raise UserError(where, "its parameters are sharded", "apply the method first, then shard the model")
