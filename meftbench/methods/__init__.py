"""Apply a fine-tuning method, and memory optimisations (levers), to a model by their names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meftbench.backbones.patched import check_trainable
from meftbench.backbones.quantize import keep_layout
from meftbench.backbones.trunk import trunk_of
from meftbench.catalogue import resolve
from meftbench.catalogue.combinations import check_attention, check_together
from meftbench.catalogue.labels import read_label, split_label
from meftbench.catalogue.levers import LEVERS, NOT_IN_A_MODEL
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.peft_methods import NOT_APPLICABLE
from meftbench.errors import UserError, unknown
from meftbench.methods.all_or_nothing import all_or_nothing
from meftbench.methods.applied import NOTE, Applied, check_untouched, note_before
from meftbench.methods.full import check_some_trained
from meftbench.methods.levers.base import made_lever
from meftbench.methods.whole_model import check_not_held_twice, warn_on_save
from meftbench.strict_yaml import settings_of

__all__ = ["Applied", "apply_method", "prepare"]


def apply_method(
    model: nn.Module, method: str, *, seed: int | None = None, module: str | None = None, **settings: Any
) -> nn.Module:
    """Apply a method to a transformers model, in place, and return the model to train.

    model: a transformers model; or a module of your own with one inside. Then the transformers model inside is changed,
        and the parameters that are your own keep their `requires_grad`. save_adapter and load_adapter take only the
        transformers model inside.
    method: a name of `meftbench list methods`, with levers joined to it by `+` ("meft1", "lora+checkpoint"); settings
        of either may follow in brackets ("lora(rank=4)+checkpoint(every=2)").
    settings: the method's hyper-parameters, as in a suite (lambda is written `lambda_`).
    seed: for the new weights; None: they are drawn from torch's global generator.
    module: dotted name of the transformers model in your module, needed where there are several.
    Levers that act around the forward pass (offload, weight_offload) or in the training step (optimizer_in_backward,
    optimizer_offload) cannot be put into a model. `mezo` is an optimizer: use meftbench.methods.mezo.ForwardOnly.

    Raises UserError: unknown name or setting, a model without a layout, a method applied twice, a wrapper around the
    model (DataParallel, DistributedDataParallel, FSDP, torch.compile).
    """
    (name, _), *levers = split_label(method)
    for lever, _ in levers:
        if lever in NOT_IN_A_MODEL:
            raise UserError(method, f"{lever} is not part of a model", NOT_IN_A_MODEL[lever])
    if name in METHODS and not METHODS[name].backward:
        cure = "take meftbench.methods.mezo.ForwardOnly(parameters, lr=...) and its step(closure)"
        raise UserError(method, f"{name} is an optimizer, and no part of a model", cure)
    return prepare(model, method, settings, seed=seed, module=module).model


def prepare(
    model: nn.Module,
    method: str,
    settings: dict[str, Any] | None = None,
    *,
    seed: int | None = None,
    module: str | None = None,
    lever_settings: dict[str, dict[str, Any]] | None = None,
) -> Applied:
    """Like `apply_method`, but return an `Applied`: the model, and what training steps and probes need besides it.

    lever_settings: by lever, settings beside those in brackets.
    Where an error is raised, the model is left as it was.
    """
    (name, in_brackets), *named_levers = read_label("apply_method", method)
    levers = {lever: given | (lever_settings or {}).get(lever, {}) for lever, given in named_levers}
    if name in NOT_APPLICABLE:
        raise UserError(
            "apply_method", f"{name} does not apply: {NOT_APPLICABLE[name].reason}", "choose another method"
        )
    if name not in METHODS:
        raise unknown("apply_method", "method", name, METHODS)
    for lever in levers:
        if lever not in LEVERS:
            raise unknown("apply_method", "lever", lever, LEVERS)
    check_together(method, name, levers)
    entry = METHODS[name]
    checked = settings_of(name, entry.settings, in_brackets | (settings or {}))
    lever_objects = {lever: made_lever("apply_method", lever, levers[lever]) for lever in LEVERS if lever in levers}
    trunk = trunk_of(model, module)
    check_attention(method, levers, getattr(getattr(trunk.model, "config", None), "_attn_implementation", None))
    check_trainable(model)
    check_untouched(model)
    with all_or_nothing(model):
        keep_layout(model)
        note = note_before(trunk.model, name, checked)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            applied = resolve(entry.home)(trunk.model, checked, *entry.given)
        if checked.whole:
            check_some_trained(model)
        setattr(applied.model, NOTE, note)
        for lever, made in lever_objects.items():
            applied.levers[lever] = made
            made.apply(applied)
            note["levers"].append(lever)
        warn_on_save(trunk.model)
        check_not_held_twice(model)
        applied.model = trunk.replaced_in(model, applied.model)
    assert isinstance(applied, Applied)
    return applied
