"""An adapter on disk, and the way back to the pre-trained model: `save_adapter`, `load_adapter`, `unload`.

The folder is as peft users know it: adapter_config.json says method, settings and base model, adapter_model.safetensors
holds what was trained. What is in peft's wrapper is written, read and unloaded by peft.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from meftbench import __version__
from meftbench.backbones.quantize import is_quantized, keep_layout
from meftbench.backbones.trunk import trunk_of
from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.methods.adapter_files import (
    CONFIG,
    PEFT_TYPE,
    SCHEMA,
    WEIGHTS,
    as_json,
    base_of_config,
    check_same,
    check_saved_vocabulary,
    check_tensors,
    check_vocabulary,
    read,
    sample_of,
    warn_of_base,
    warn_of_weights,
    write,
)
from meftbench.methods.all_or_nothing import all_or_nothing
from meftbench.methods.applied import NOTE, ranges_of, vocabulary_of
from meftbench.methods.bottleneck import Bottleneck
from meftbench.methods.meft import VARIANTS
from meftbench.methods.saving_peft import files_by_peft, load_by_peft
from meftbench.methods.unloading import (
    applied_inside,
    in_new_head,
    is_peft,
    note_of,
    trained_backbone,
)

_WRITTEN = {"method": str, "settings": dict, "base_model_class": str, "hidden_sizes": list, "backbone": list}
# Settings that say how the work is done, or where new weights start: not what a trained model computes.
_FREE = ("tiles", "head_groups", "strict", "init_std")


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write what was trained on the pre-trained model: adapters, the new task head, and what else requires grad.

    model: as `apply_method` gave it.  folder: made if needed; an adapter that is there already is replaced, or left as
        it was where writing fails.
    Levers are named in adapter_config.json and are not applied again by `load_adapter`.

    Raises UserError: no method applied, full fine-tuning, a module of your own around the model (give the part inside),
    the folder cannot be written.
    """
    _check_no_own_module(model, "save_adapter")
    note = note_of(model)
    if note.get("method") == "full":
        cure = "save the whole model: model.save_pretrained(folder)"
        raise UserError(type(model).__name__, "full fine-tuning has no adapter", cure)
    write(Path(folder), files_by_peft(model) if is_peft(model) else _files(model, note))


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put a saved adapter on `model` and return the model to train or to use (peft's wrapper for LoRA).

    model: a pre-trained model, to which the saved method is applied first; or one with the same method and settings
        applied, whose weights are replaced (`tiles`, `head_groups` and `strict` may differ). dtype, device and mode
        of the model are kept. Where an error is raised, the model is as it was.

    The range of fixed-point streams is loaded too: the logits are those of the saved model, bit for bit.

    Warns: the base model has another name, revision or weights than the one that was saved from.
    Raises UserError: nothing readable in the folder, another method or other settings applied, another class of model
    or hidden size, and tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    _check_no_own_module(model, "load_adapter")
    with all_or_nothing(model):
        return _loaded(model, folder, *read(folder))


def _check_no_own_module(model: nn.Module, what_for: str) -> None:
    """Raises UserError for a module of the user's around a transformers model: an adapter is of the part inside."""
    inside = applied_inside(model) or trunk_of(model).path
    if inside and not is_peft(model):
        cure = f"give {what_for} model.{inside}, and save what is your own by torch.save"
        raise UserError(type(model).__name__, f"is your own module around {inside!r}", cure)


def _loaded(
    model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> nn.Module:
    if config.get("peft_type") != PEFT_TYPE:
        found = load_by_peft(model, folder, config, tensors, metadata)
        keep_layout(found)
        return found
    for key, kind in _WRITTEN.items():
        if not isinstance(config.get(key), kind):
            raise UserError(str(folder / CONFIG), f"{key} is missing or no {kind.__name__}", "save the adapter again")
    if config["schema"] == 1:
        config["settings"] = _settings_of_schema_1(config["method"], config["settings"])
    method, settings = config["method"], _with_added_settings(config["settings"])
    applied: dict[str, Any] | None = {"method": "of peft"} if is_peft(model) else vars(model).get(NOTE)
    if applied is not None:
        check_same(folder, method, applied["method"], settings, applied.get("settings", {}), _FREE)
    if config["base_model_class"] != type(model).__name__:
        what = f"was saved from a {config['base_model_class']}, not a {type(model).__name__}"
        raise UserError(str(folder), what, f"load it into a {config['base_model_class']}")
    warn_of_base(model, config)
    if applied is not None:
        _fill(model, folder, config, tensors)
        return model
    prepare(model, method, settings, seed=0)  # the caller's random numbers stay; the new weights are replaced
    _fill(model, folder, config, tensors)
    return model if model.training else model.eval()


def _with_added_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an adapter was saved without because they are newer, at what they then were."""
    return {"stream_bits": 32} | settings if "arithmetic" in settings else settings


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


def _files(model: nn.Module, note: dict[str, Any]) -> dict[str, bytes]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _own(model).items()}
    tensors |= {name: held.get_extra_state() for name, held in ranges_of(model).items()}
    embeddings = model.get_input_embeddings() if vocabulary_of(model) else None  # type: ignore[operator]
    check_saved_vocabulary(model, note.get("vocabulary"), embeddings is not None and embeddings.weight.requires_grad)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = {
        "peft_type": PEFT_TYPE,
        "schema": SCHEMA,
        "meftbench_version": __version__,
        "method": note["method"],
        "settings": note["settings"],
        "levers": note["levers"],
        **base_of_config(model),
        "vocabulary": vocabulary_of(model),
        "base_model_class": type(model).__name__,
        "hidden_sizes": _hidden_sizes(model),
        "modules_to_save": sorted({name.split(".")[0] for name in _own(model) if in_new_head(model, name)}),
        "backbone": trained_backbone(model),
        "base_sample": {} if is_quantized(model) else sample_of(model, _own(model)),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return {WEIGHTS: weights, CONFIG: as_json(config)}


def _fill(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The saved tensors into a model with the method applied; nothing is changed where one does not fit."""
    if config["hidden_sizes"] != _hidden_sizes(model):
        saved, found = (", ".join(map(str, sizes)) for sizes in (config["hidden_sizes"], _hidden_sizes(model)))
        cure = "load it into the model that it was saved from"
        raise UserError(str(folder), f"is for hidden size {saved}, the model's is {found}", cure)
    check_vocabulary(folder, model, config.get("vocabulary"))
    own, ranges = _own(model, also=config["backbone"]), ranges_of(model)
    for name in ranges:
        if name not in tensors:
            what = f"lacks {name!r}, the range of its fixed-point streams"
            raise UserError(str(folder / WEIGHTS), what, "save the adapter again from the model that it was trained on")
        if tensors[name].numel() not in (0, *config["hidden_sizes"]):
            what = f"{name!r} is of {tensors[name].numel()} channels"
            raise UserError(str(folder / WEIGHTS), what, "load it into the model that it was saved from")
    if not is_quantized(model):
        warn_of_weights(folder, model, own, config)
    check_tensors(folder, own, {name: tensor for name, tensor in tensors.items() if name not in ranges})
    for name, held in ranges.items():
        held.set_extra_state(tensors[name])
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for name in config["backbone"]:
        own[name].requires_grad_(True)
