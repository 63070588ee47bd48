"""The way back: a method taken off again, the pre-trained model as it was, bit for bit."""

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

_PACKAGES = ("meftbench.backbones.", "meftbench.methods.", "meftbench.reversible.")


def unload(model: nn.Module) -> nn.Module:
    """Take the method and its levers off again and return the pre-trained model, bit for bit as it was.

    It is the object that `apply_method` was given, with its layers in their places and `requires_grad` as before; hooks
    of others stay. A new task head keeps what it was trained to, as does what is yours in a module around the
    pre-trained model. Afterwards a method can be applied again.

    Raises UserError: no method applied, or weights of the pre-trained model were trained themselves.
    """
    if (path := applied_inside(model)) is not None:
        inside = model.get_submodule(path)
        replace(model, inside, unload(inside))
        return model
    note = note_of(model)
    if note.get("method") == "full":
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
        _forget(module, "compile" in note.get("levers", ()))
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
    """Name of the transformers model in a module around it that has the method applied; None: there is no such."""
    if NOTE in vars(model) or is_peft(model):
        return None
    return next((name for name, module in model.named_modules() if NOTE in vars(module)), None)


def note_of(model: nn.Module) -> dict[str, Any]:
    note: dict[str, Any] | None = vars(model).get(NOTE)
    if note is None and not is_peft(model):
        cure = "apply one with meftbench.apply_method, and give the model that it returned, not a wrapper of it"
        raise UserError(type(model).__name__, "has no method applied", cure)
    return note or {}


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")


def in_new_head(model: nn.Module, name: str) -> bool:
    if predicts_tokens(model) or base_of(model) is model:
        return False
    return not name.startswith(f"{model.base_model_prefix}.")


def _in_head(model: Any, name: str) -> bool:
    return in_new_head(model.get_base_model(), name)


def trained_backbone(model: nn.Module) -> list[str]:
    bottlenecks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Bottleneck))
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(bottlenecks) and not in_new_head(model, name)
    ]


def trained_beside(model: Any) -> dict[str, nn.Parameter]:
    """Of peft's wrapper: what requires grad and is no part of the adapter, nor a copy of a module that peft saves."""
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    of_adapter = set()
    for module in model.modules():
        names: tuple[str, ...] = ()
        if isinstance(module, BaseTunerLayer):
            names = tuple(module.adapter_layer_names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            names = ("modules_to_save", "token_adapter")
        for name in names:
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                of_adapter |= {id(parameter) for parameter in part.parameters()}
    written = {
        tensor.data_ptr()
        for adapter in model.active_adapters
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).values()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in of_adapter and parameter.data_ptr() not in written
    }


def and_more(names: list[str], what: str) -> str:
    rest = len(names) - 1
    return f", and {rest} more {what}{'s' if rest > 1 else ''}" if rest else ""


def _restore_modules(model: nn.Module) -> None:
    """The layers back in their lists, without adapters."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.ModuleList) and any(isinstance(part, ReversibleStack) for part in child):
                layers = nn.ModuleList(_layers(child))
                layers.training = child.training
                setattr(module, name, layers)
            elif isinstance(child, Bottleneck) or name == ADAPTERS:
                del module._modules[name]


def _layers(parts: nn.ModuleList) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for part in parts:
        if isinstance(part, ReversibleStack):
            layers.extend(block.get_submodule("layer") for block in part.blocks)
        elif not isinstance(part, Relay):
            layers.append(part)
    return layers


def _forget(module: nn.Module, compiled: bool) -> None:
    """Remove our hooks and what we have set on the instance; that of others stays."""
    tables: list[dict[int, Any]] = [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    ]
    for key in [key for table in tables[:2] for key, hook in table.items() if _is_ours(hook)]:
        for table in tables:
            table.pop(key, None)  # a hook's key is the same in all of them, and no other's
    for name in [name for name, value in vars(module).items() if _is_ours(value)]:
        delattr(module, name)
        if name == BEHIND_HOOK:  # which accelerate's hook calls
            setattr(module, name, MethodType(type(module).forward, module))
    if compiled:
        module._compiled_call_impl = None


def _is_ours(function: object) -> bool:
    """Whether it is a function, a method or a partial of one, that a layout, a method or a lever has put there. By
    where it is defined: that holds for a copied and for a pickled model."""
    while isinstance(function, partial):
        function = function.func
    return callable(function) and str(getattr(function, "__module__", "")).startswith(_PACKAGES)


def _restore_checkpointing(base: nn.Module, checkpointed: set[str], options: dict[str, Any] | None) -> None:
    """checkpointed: names of the modules that were.  options: of torch's checkpoint then; None: it was never on."""
    for name, module in base.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = name in checkpointed
            if options is None:
                vars(module).pop("_gradient_checkpointing_func", None)
            else:
                module._gradient_checkpointing_func = partial(checkpoint, **options)


def restore_gradients(base: nn.Module, note: dict[str, Any]) -> None:
    frozen = set(note.get("frozen", ()))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name not in frozen)


def changes_weights(config: Any) -> bool:
    """Whether the adapter starts from a part of the weights that is taken out of them (PiSSA, OLoRA, KaSA and kin)."""
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
    if model.active_peft_config.is_prompt_learning:  # only a wrapper, and a wrapped head
        base: nn.Module = tuner
    elif model.active_peft_config.is_adaption_prompt:  # which peft can switch off and not unload
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
