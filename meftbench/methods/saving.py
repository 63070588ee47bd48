"""An adapter on disk, and the way back to the pre-trained model: `save_adapter`, `load_adapter`, `unload`.

The folder is as peft users know it: adapter_config.json says method, settings and base model, adapter_model.safetensors
holds what was trained. What is in peft's wrapper is written, read and unloaded by peft.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meftbench import __version__
from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.methods.applied import NOTE, note_before, ranges_of
from meftbench.methods.bottleneck import Bottleneck
from meftbench.methods.meft import VARIANTS
from meftbench.methods.unloading import (
    and_more,
    changes_weights,
    in_new_head,
    is_peft,
    note_of,
    restore_gradients,
    trained_backbone,
    unload,
)
from meftbench.plan.catalogue import Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "MEFTBENCH"
SCHEMA = 2  # 1: before streams took their range from the model
_WRITTEN = {"method": str, "settings": dict, "base_model_class": str, "hidden_sizes": list, "backbone": list}
# Settings that say how the work is done, or where new weights start: not what a trained model computes.
_FREE = ("tiles", "head_groups", "strict", "init_std")
_PEFT_FREE = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write what was trained on the pre-trained model: adapters, the new task head, and what else requires grad.

    model: as `apply_method` gave it.  folder: made if needed; an adapter that is there already is replaced, or left as
        it was where writing fails.
    Levers are named in adapter_config.json and are not applied again by `load_adapter`.

    Raises UserError: no method applied, full fine-tuning, the folder cannot be written.
    """
    note = note_of(model)
    if note.get("method") == "full":
        cure = "save the whole model: model.save_pretrained(folder)"
        raise UserError(type(model).__name__, "full fine-tuning has no adapter", cure)
    _write(Path(folder), _files_by_peft(model) if is_peft(model) else _files(model, note))


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put a saved adapter on `model` and return the model to train or to use (peft's wrapper for LoRA).

    model: a pre-trained model, to which the saved method is applied first; or one with the same method and settings
        applied, whose weights are replaced (`tiles`, `head_groups` and `strict` may differ). dtype, device and mode
        of the model are kept. Where an error is raised, the model is as it was.

    The range of fixed-point streams is loaded too: the logits are those of the saved model, bit for bit.

    Warns: the base model has another name or revision than the one that was saved from.
    Raises UserError: nothing readable in the folder, another method or other settings applied, another class of model
    or hidden size, and tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    if config.get("peft_type") != PEFT_TYPE:
        return _load_by_peft(model, folder, config, tensors)
    for key, kind in _WRITTEN.items():
        if not isinstance(config.get(key), kind):
            raise UserError(str(folder / CONFIG), f"{key} is missing or no {kind.__name__}", "save the adapter again")
    if config["schema"] == 1:
        config["settings"] = _settings_of_schema_1(config["method"], config["settings"])
    method, settings = config["method"], config["settings"]
    applied: dict[str, Any] | None = {"method": "of peft"} if is_peft(model) else vars(model).get(NOTE)
    if applied is not None:
        _check_same(folder, method, applied["method"], settings, applied.get("settings", {}), _FREE)
    if config["base_model_class"] != type(model).__name__:
        what = f"was saved from a {config['base_model_class']}, not a {type(model).__name__}"
        raise UserError(str(folder), what, f"load it into a {config['base_model_class']}")
    _warn_of_base(model, config)
    if applied is not None:
        _fill(model, folder, config, tensors)
        return model
    prepare(model, method, settings, seed=0)  # the caller's random numbers stay; the new weights are replaced
    try:
        _fill(model, folder, config, tensors)
    except UserError:
        unload(model)
        raise
    return model if model.training else model.eval()


def _settings_of_schema_1(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were meant before their defaults changed: the model computes what it was trained to compute."""
    if "arithmetic" not in settings:
        return settings
    meant = settings | {"adapter_input": "stream"}
    if settings["arithmetic"] == "exact" and settings.get("side_bits") is None:
        factors = [name for name, small in zip(("lambda", "beta"), VARIANTS[method[:5]].small, strict=True) if small]
        if all(settings.get(name) is None for name in ("lambda", "beta")):
            meant["side_bits"] = 3
        else:
            meant |= {name: 1 / 8 for name in factors if settings.get(name) is None}
    return meant


# --- what is saved ---


def _own(model: nn.Module, also: list[str] | None = None) -> dict[str, Tensor]:
    """The tensors of the adapter by name: bottlenecks, the new task head, what else requires grad, and `also`."""
    bottlenecks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Bottleneck))
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("._extra_state"):  # of ranges, which `ranges_of` has
            continue
        own = name.startswith(bottlenecks) or in_new_head(model, name) or tensor.requires_grad
        if own or name in (also or ()):
            found.setdefault(id(tensor), (name, tensor))  # tied weights are saved once
    return dict(found.values())


def _hidden_sizes(model: nn.Module) -> list[int]:
    return sorted({module.down.in_features for module in model.modules() if isinstance(module, Bottleneck)})


def _base_of_config(model: Any) -> dict[str, str | None]:
    config = model.config
    return {
        "base_model_name_or_path": getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
    }


def _files(model: nn.Module, note: dict[str, Any]) -> dict[str, bytes]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _own(model).items()}
    tensors |= {name: held.get_extra_state() for name, held in ranges_of(model).items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = {
        "peft_type": PEFT_TYPE,
        "schema": SCHEMA,
        "meftbench_version": __version__,
        "method": note["method"],
        "settings": note["settings"],
        "levers": note["levers"],
        **_base_of_config(model),
        "base_model_class": type(model).__name__,
        "hidden_sizes": _hidden_sizes(model),
        "modules_to_save": sorted({name.split(".")[0] for name in _own(model) if in_new_head(model, name)}),
        "backbone": trained_backbone(model),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return {WEIGHTS: weights, CONFIG: _json(config)}


def _json(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


# --- files ---


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """All of `files`: each is on the disk, beside its place, before the first is moved there."""
    made, beside = not folder.exists(), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, beside[name] = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(beside[name], 0o644)
        for name, temporary in beside.items():
            os.replace(temporary, folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        for temporary in beside.values():
            Path(temporary).unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it holds the adapter, or was not made
                folder.rmdir()


def _unwritable(folder: Path | str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(str(folder), f"cannot be written ({reason})", "make room, or choose another folder")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a folder. Raises UserError: not there, damaged, of a newer schema."""
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "name a folder that save_adapter wrote")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(str(folder), f"holds no {name}", "name a folder that save_adapter wrote")
    again = "save the adapter again, or take both files from a backup"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(folder / CONFIG), f"cannot be read ({error})", again) from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(str(folder / CONFIG), "is no configuration of an adapter", again)
    if config["peft_type"] == PEFT_TYPE and config.get("schema") not in (1, SCHEMA):
        raise UserError(str(folder / CONFIG), f"is of schema {config.get('schema')!r}", "update meftbench")
    try:
        weights = (folder / WEIGHTS).read_bytes()
        tensors = safetensors.torch.load(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(str(folder / WEIGHTS), f"cannot be read ({error})", again) from None
    if config.get("weights_sha256", hashlib.sha256(weights).hexdigest()) != hashlib.sha256(weights).hexdigest():
        raise UserError(str(folder / WEIGHTS), f"was not written together with {CONFIG}", again)
    return config, tensors


# --- checks before anything is loaded ---


def _check_same(
    folder: Path,
    method: str,
    applied: str,
    settings: Mapping[str, Any],
    applied_settings: Mapping[str, Any],
    free: tuple[str, ...],
) -> None:
    cure = "load it into the pre-trained model: meftbench.unload gives it back"
    if method != applied:
        raise UserError(str(folder), f"is an adapter of {method}, the model has {applied} applied", cure)
    for key in settings.keys() | applied_settings.keys():
        saved, found = settings.get(key), applied_settings.get(key)
        if key not in free and saved != found:
            raise UserError(str(folder), f"has {key}: {saved}, the model has {key}: {found}", cure)


def _warn_of_base(model: nn.Module, config: dict[str, Any]) -> None:
    for key, found in _base_of_config(model).items():
        saved = config.get(key)
        if saved != found and (key != "revision" or (saved and found)):
            warnings.warn(f"the adapter was trained on {key} {saved!r}, this model has {found!r}", stacklevel=3)


def _check_tensors(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises UserError at the first tensor that is missing, unexpected, or of another shape."""
    where, cure = str(folder / WEIGHTS), "load it into the model that it was saved from"
    if missing := [name for name in expected if name not in found]:
        raise UserError(where, f"lacks {missing[0]!r}" + and_more(missing, "tensor"), cure)
    if unexpected := [name for name in found if name not in expected]:
        what = f"holds {unexpected[0]!r}, which the model has not" + and_more(unexpected, "tensor")
        raise UserError(where, what, cure)
    if misshapen := [name for name in expected if found[name].shape != expected[name].shape]:
        name = misshapen[0]
        what = f"{name!r} is {tuple(found[name].shape)}, the model's {tuple(expected[name].shape)}"
        raise UserError(where, what + and_more(misshapen, "tensor"), cure)


def _fill(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The saved tensors into a model with the method applied; nothing is changed where one does not fit."""
    if config["hidden_sizes"] != _hidden_sizes(model):
        saved, found = (", ".join(map(str, sizes)) for sizes in (config["hidden_sizes"], _hidden_sizes(model)))
        cure = "load it into the model that it was saved from"
        raise UserError(str(folder), f"is for hidden size {saved}, the model's is {found}", cure)
    own, ranges = _own(model, also=config["backbone"]), ranges_of(model)
    for name in ranges:
        if name not in tensors:
            what = f"lacks {name!r}, the range of its fixed-point streams"
            raise UserError(str(folder / WEIGHTS), what, "save the adapter again from the model that it was trained on")
        if tensors[name].numel() not in (0, *config["hidden_sizes"]):
            what = f"{name!r} is of {tensors[name].numel()} channels"
            raise UserError(str(folder / WEIGHTS), what, "load it into the model that it was saved from")
    _check_tensors(folder, own, {name: tensor for name, tensor in tensors.items() if name not in ranges})
    for name, held in ranges.items():
        held.set_extra_state(tensors[name])
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for name in config["backbone"]:
        own[name].requires_grad_(True)


# --- what peft has wrapped ---


def _files_by_peft(model: Any) -> dict[str, bytes]:
    adapter = model.active_adapters[0]
    with tempfile.TemporaryDirectory() as temporary:
        try:
            model.save_pretrained(temporary, selected_adapters=[adapter])
        except (OSError, SafetensorError) as error:
            raise _unwritable(temporary, error) from None
        source = Path(temporary) / ("" if adapter == "default" else adapter)
        weights, config = (source / WEIGHTS).read_bytes(), json.loads((source / CONFIG).read_bytes())
    if beside := {name: p.detach().cpu().contiguous() for name, p in _beside(model).items() if p.requires_grad}:
        weights = safetensors.torch.save(safetensors.torch.load(weights) | beside, metadata={"format": "pt"})
    for key, value in _base_of_config(model.get_base_model()).items():
        config[key] = config.get(key) or value
    return {WEIGHTS: weights, CONFIG: _json(config)}


def _beside(model: Any) -> dict[str, nn.Parameter]:
    """What peft does not write: the new task head of a method with no modules to save, such as prompts, and what
    prompts are computed from, of which peft keeps the result only. peft itself reads the file with them as well."""
    found = _heads_beside(model)
    for adapter, encoder in getattr(model, "prompt_encoder", {}).items():
        parameters = dict(encoder.named_parameters(prefix=f"prompt_encoder.{adapter}"))
        found |= parameters if len(parameters) > 1 else {}
    return found


def _heads_beside(model: Any) -> dict[str, nn.Parameter]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    by_peft = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for parameter in cast(nn.Module, module).parameters()
    }
    heads = {id(parameter) for name, parameter in base.named_parameters() if in_new_head(base, name)} - by_peft
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in heads}


def _load_by_peft(model: Any, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    from peft import PeftConfig, get_peft_model

    try:
        saved = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(folder / CONFIG), f"peft cannot read it ({error})", "save the adapter again") from None
    method = str(config["peft_type"]).lower()
    if is_peft(model):
        found = model.peft_config[model.active_adapters[0]]
        applied = str(found.peft_type.value).lower()
        _check_same(folder, method, applied, saved.to_dict(), found.to_dict(), _PEFT_FREE)
        _warn_of_base(model.get_base_model(), config)
        _fill_by_peft(model, folder, tensors)
        return cast(nn.Module, model)
    if NOTE in vars(model):
        _check_same(folder, method, vars(model)[NOTE]["method"], {}, {}, ())
    _warn_of_base(model, config)
    note = note_before(model, method, Settings())
    saved.inference_mode, saved.base_model_name_or_path = False, None
    try:
        with torch.random.fork_rng(devices=[]):
            if changes_weights(saved):
                # There is no way back from that: whether all fits is tried with a start that changes nothing.
                trial = copy.deepcopy(saved)
                trial.init_lora_weights = True
                unload(_filled_by_peft(get_peft_model(model, trial), note, folder, tensors))
            wrapped = _filled_by_peft(get_peft_model(model, saved), note, folder, tensors)
    except (ValueError, AttributeError) as error:
        vars(model).pop("peft_config", None)
        restore_gradients(model, note)
        reason = str(error).strip().splitlines()[0]
        raise UserError(str(folder), f"does not fit the model ({reason})", "load it into its own base model") from None
    return wrapped if model.training else wrapped.eval()


def _filled_by_peft(wrapped: nn.Module, note: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    setattr(wrapped, NOTE, note)
    try:
        _fill_by_peft(wrapped, folder, tensors)
    except UserError:
        unload(wrapped)
        raise
    return wrapped


def _fill_by_peft(model: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    adapter = model.active_adapters[0]
    embedded = any(part in EMBEDDING_LAYER_NAMES for name in tensors for part in name.split("."))
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=embedded)
    beside = {name: p for name, p in _beside(model).items() if name in tensors or p.requires_grad}
    _check_tensors(folder, own | beside, tensors)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    with torch.no_grad():
        for name, parameter in beside.items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(True)
