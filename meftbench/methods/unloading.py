"""Remove a method from a model again: `unload` returns the pre-trained model, bit for bit as it was."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from meftbench.backbones import base_of
from meftbench.backbones.patched import BEHIND_HOOK
from meftbench.backbones.residual import ADAPTERS
from meftbench.backbones.trunk import replace
from meftbench.errors import UserError
from meftbench.methods.applied import NOTE, predicts_tokens, vocabulary_of
from meftbench.methods.bottleneck import Bottleneck
from meftbench.reversible import Relay, ReversibleStack

# Packages whose functions are removed from the model's modules.
_PACKAGES = ("meftbench.backbones.", "meftbench.methods.", "meftbench.reversible.")


def unload(model: nn.Module) -> nn.Module:
    """Remove the method and its levers (memory optimisations) and return the pre-trained model, bit for bit as it was.

    It is the object that `apply_method` was given, with its layers in their places and `requires_grad` as before; hooks
    that others registered stay. A new task head keeps its trained weights, and so does your own module around the
    pre-trained model. Afterwards a method can be applied again.

    Raises UserError: no method applied, or weights of the pre-trained model were trained themselves.
    """
    if (path := applied_inside(model)) is not None:
        inside = model.get_submodule(path)
        replace(model, inside, unload(inside))
        return model
    note = note_of(model)
    if note.get("whole"):
        cure = "load the pre-trained model afresh"
        raise UserError(type(model).__name__, "full fine-tuning changed the weights themselves", cure)
    _check_vocabulary(model, note)
    if is_peft(model):
        base = _unloaded_by_peft(model)
    else:
        base = model
        if trained := trained_backbone(model):
            what = f"{trained[0]!r} of the pre-trained model requires grad" + and_more(trained, "tensor")
            raise UserError(type(model).__name__, what, "load the pre-trained model afresh")
        _restore_modules(model)
        delattr(model, NOTE)
    for module in base.modules():
        _remove_changes(module, "compile" in note.get("levers", ()))
    if "checkpoint" in note.get("levers", ()):
        _restore_checkpointing(base, set(note["checkpointed"]), note["checkpointing"])
    restore_gradients(base, note)
    return base


def _check_vocabulary(model: Any, note: dict[str, Any]) -> None:
    base = model.get_base_model() if is_peft(model) else model
    before, rows = note.get("vocabulary"), vocabulary_of(base)
    if before is not None and before != rows:
        what = f"its vocabulary was resized from {before} to {rows} after the method was applied"
        raise UserError(type(base).__name__, what, "load the pre-trained model afresh")


def applied_inside(model: nn.Module) -> str | None:
    """Dotted name of the submodule of `model` that has a method applied; None: `model` has it itself, or none has."""
    if NOTE in vars(model) or is_peft(model):
        return None
    return next((name for name, module in model.named_modules() if NOTE in vars(module)), None)


def note_of(model: nn.Module) -> dict[str, Any]:
    """What was noted of the applied method (`note_before`); empty for a model that only peft itself has wrapped.

    Raises UserError: no method is applied.
    """
    note: dict[str, Any] | None = vars(model).get(NOTE)
    if note is None and not is_peft(model):
        cure = "apply one with meftbench.apply_method, and give the model that it returned, not a wrapper of it"
        raise UserError(type(model).__name__, "has no method applied", cure)
    return note or {}


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")


def in_new_head(model: nn.Module, name: str) -> bool:
    """Whether the parameter called `name` belongs to a new task head, outside the pre-trained base model."""
    if predicts_tokens(model) or base_of(model) is model:
        return False
    return not name.startswith(f"{model.base_model_prefix}.")


def _in_head(model: Any, name: str) -> bool:
    return in_new_head(model.get_base_model(), name)


def trained_backbone(model: nn.Module) -> list[str]:
    """Names of the trained parameters that belong neither to an adapter nor to a new task head."""
    bottlenecks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Bottleneck))
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(bottlenecks) and not in_new_head(model, name)
    ]


def trained_beside(model: Any) -> dict[str, nn.Parameter]:
    """Parameters in peft's wrapper, by name, that require grad and belong neither to the adapter nor to the copy of a
    module that peft saves."""
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapter_ids = set()
    for module in model.modules():
        names: tuple[str, ...] = ()
        if isinstance(module, BaseTunerLayer):
            names = tuple(module.adapter_layer_names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            names = ("modules_to_save", "token_adapter")
        for name in names:
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                adapter_ids |= {id(parameter) for parameter in part.parameters()}
    written_pointers = {
        tensor.data_ptr()
        for adapter in model.active_adapters
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).values()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapter_ids and parameter.data_ptr() not in written_pointers
    }


def and_more(names: list[str], what: str) -> str:
    """The end of a message that has named the first of `names`: how many more there are; empty where it is alone."""
    remaining = len(names) - 1
    return f", and {remaining} more {what}{'s' if remaining > 1 else ''}" if remaining else ""


def _restore_modules(model: nn.Module) -> None:
    """Put the layers of reversible stacks back into their lists, and remove adapters."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.ModuleList) and any(isinstance(part, ReversibleStack) for part in child):
                layers = nn.ModuleList(_original_layers(child))
                layers.training = child.training
                setattr(module, name, layers)
            elif isinstance(child, Bottleneck) or name == ADAPTERS:
                del module._modules[name]


def _original_layers(parts: nn.ModuleList) -> list[nn.Module]:
    """The layers of a list in which a stack, with its relays, has taken the place of some."""
    layers: list[nn.Module] = []
    for part in parts:
        if isinstance(part, ReversibleStack):
            layers.extend(block.get_submodule("layer") for block in part.blocks)
        elif not isinstance(part, Relay):
            layers.append(part)
    return layers


def _remove_changes(module: nn.Module, compiled: bool) -> None:
    """Remove from `module` the hooks and attributes that this package has set; those of others stay.

    compiled: whether the module may have been compiled by `+compile`.
    """
    tables: list[dict[int, Any]] = [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    ]
    for key in [key for table in tables[:2] for key, hook in table.items() if _is_from_this_package(hook)]:
        for table in tables:
            table.pop(key, None)  # a hook has the same key in all tables, and no other hook has it
    for name in [name for name, value in vars(module).items() if _is_from_this_package(value)]:
        delattr(module, name)
        if name == BEHIND_HOOK:  # accelerate's hook calls this attribute
            setattr(module, name, MethodType(type(module).forward, module))
    if compiled:
        module._compiled_call_impl = None


def _is_from_this_package(function: object) -> bool:
    """Whether this is a function, a method, or a partial of one, that a layout, a method or a lever has put there.

    It is recognised by the module that defines it, which is the same for a copied and for an unpickled model.
    """
    while isinstance(function, partial):
        function = function.func
    return callable(function) and str(getattr(function, "__module__", "")).startswith(_PACKAGES)


def _restore_checkpointing(base: nn.Module, checkpointed: set[str], options: dict[str, Any] | None) -> None:
    """Switch transformers' gradient checkpointing to what it was before the lever.

    checkpointed: names of the modules that were checkpointed.
    options: the arguments of torch's checkpoint at that time; None: checkpointing had never been switched on.
    """
    for name, module in base.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = name in checkpointed
            if options is None:
                vars(module).pop("_gradient_checkpointing_func", None)
            else:
                module._gradient_checkpointing_func = partial(checkpoint, **options)


def restore_gradients(base: nn.Module, note: dict[str, Any]) -> None:
    """Set `requires_grad` of every parameter to what it was before the method was applied."""
    frozen = set(note.get("frozen", ()))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name not in frozen)


def changes_weights(config: Any) -> bool:
    """Whether the adapter starts from a part of the weights that peft removes from them (PiSSA, OLoRA, KaSA ...)."""
    start = getattr(config, "init_lora_weights", True)
    by_start = isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal")
    return by_start or getattr(config, "kasa_config", None) is not None


def _unloaded_by_peft(model: Any) -> nn.Module:
    from peft.utils.other import ModulesToSaveWrapper

    name, cure = type(model.get_base_model()).__name__, "load the pre-trained model afresh"
    if any(changes_weights(config) for config in model.peft_config.values()):
        raise UserError(name, "its weights were changed when the adapter was started from them", cure)
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise UserError(name, "the adapter is merged into its weights", cure)
    heads = {id(parameter) for key, parameter in model.get_base_model().named_parameters() if _in_head(model, key)}
    trained = [key for key, p in trained_beside(model).items() if id(p) not in heads and not key.startswith("prompt_")]
    if trained:
        what = f"{trained[0]!r} of the pre-trained model requires grad" + and_more(trained, "tensor")
        raise UserError(name, what, cure)
    tuner = model.base_model
    if model.active_peft_config.is_prompt_learning:  # peft has only wrapped the model, and its head
        base: nn.Module = tuner
    elif model.active_peft_config.is_adaption_prompt:  # peft can switch it off but not unload it
        tuner.disable_adapter_layers()
        base = model.get_base_model()
    else:
        base = tuner.unload()
    for module in list(base.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ModulesToSaveWrapper):
                head = child.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(module, name, head)
    return base
