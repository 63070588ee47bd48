"""An adapter on disk: `save_adapter` and `load_adapter`.

The folder has the files that peft users know: adapter_config.json holds method, settings and base model,
adapter_model.safetensors what was trained. A model in peft's wrapper is written and read by peft.
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

_REQUIRED_FIELDS = {"method": str, "settings": dict, "base_model_class": str, "hidden_sizes": list, "backbone": list}
# Settings that may differ between adapter and model, because they do not change what a trained model computes: they say
# in which pieces it is computed, what is verified, or how new weights are initialised.
_MAY_DIFFER = ("tiles", "head_groups", "strict", "init_std")


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write what was trained on the pre-trained model: adapters, the new task head, and what else requires grad.

    model: as `apply_method` returned it.
    folder: made if needed; an adapter that is there already is replaced, or left as it was where writing fails.
    Levers (memory optimisations) are named in adapter_config.json, but `load_adapter` does not apply them again.

    Raises UserError: no method applied, full fine-tuning, a module of your own around the model (give the part inside),
    the folder cannot be written.
    """
    _check_no_own_module(model, "save_adapter")
    note = note_of(model)
    if note.get("whole"):
        cure = "save the whole model: model.save_pretrained(folder)"
        raise UserError(type(model).__name__, "full fine-tuning has no adapter", cure)
    write(Path(folder), files_by_peft(model) if is_peft(model) else _files(model, note))


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put a saved adapter on `model` and return the model to train or to use (peft's wrapper for LoRA).

    model: a pre-trained model, to which the saved method is applied first; or one with the same method and settings
        applied, whose weights are replaced (`tiles`, `head_groups`, `strict` and `init_std` may differ). dtype, device
        and mode of the model are kept. Where an error is raised, the model is left as it was.

    The range of fixed-point streams is loaded too: the logits are those of the saved model, bit for bit.

    Warns: the base model has another name, revision or weights than the one that the adapter was trained on.
    Raises UserError: nothing readable in the folder, another method or other settings applied, another class of model
    or hidden size, and tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    _check_no_own_module(model, "load_adapter")
    with all_or_nothing(model):
        return _loaded(model, folder, *read(folder))


def _check_no_own_module(model: nn.Module, what_for: str) -> None:
    """Raises UserError for a user's own module around a transformers model: an adapter belongs to the model inside."""
    inside = applied_inside(model) or trunk_of(model).path
    if inside and not is_peft(model):
        cure = f"give {what_for} model.{inside}, and save what is your own by torch.save"
        raise UserError(type(model).__name__, f"is your own module around {inside!r}", cure)


def _loaded(
    model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> nn.Module:
    if config.get("peft_type") != PEFT_TYPE:
        wrapped = load_by_peft(model, folder, config, tensors, metadata)
        keep_layout(wrapped)
        return wrapped
    for key, kind in _REQUIRED_FIELDS.items():
        if not isinstance(config.get(key), kind):
            raise UserError(str(folder / CONFIG), f"{key} is missing or no {kind.__name__}", "save the adapter again")
    if config["schema"] == 1:
        config["settings"] = _settings_of_schema_1(config["method"], config["settings"])
    method, settings = config["method"], _with_added_settings(config["settings"])
    applied: dict[str, Any] | None = {"method": "of peft"} if is_peft(model) else vars(model).get(NOTE)
    if applied is not None:
        check_same(folder, method, applied["method"], settings, applied.get("settings", {}), _MAY_DIFFER)
    if config["base_model_class"] != type(model).__name__:
        what = f"was saved from a {config['base_model_class']}, not a {type(model).__name__}"
        raise UserError(str(folder), what, f"load it into a {config['base_model_class']}")
    warn_of_base(model, config)
    if applied is not None:
        _fill(model, folder, config, tensors)
        return model
    prepare(model, method, settings, seed=0)  # seeded: torch's random state stays; _fill replaces the weights
    _fill(model, folder, config, tensors)
    return model if model.training else model.eval()


def _with_added_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, where those that are newer than the adapter have the value by which it was trained."""
    return {"stream_bits": 32} | settings if "arithmetic" in settings else settings


def _settings_of_schema_1(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an adapter of schema 1 with the defaults of that time written out.

    The model then computes what it was trained to compute.
    """
    if "arithmetic" not in settings:
        return settings
    explicit = settings | {"adapter_input": "stream"}
    if settings["arithmetic"] == "exact" and settings.get("side_bits") is None:
        factors = [name for name, small in zip(("lambda", "beta"), VARIANTS[method[:5]].small, strict=True) if small]
        if all(settings.get(name) is None for name in ("lambda", "beta")):
            explicit["side_bits"] = 3
        else:
            explicit |= {name: 1 / 8 for name in factors if settings.get(name) is None}
    return explicit


# --- what is saved ---


def _adapter_tensors(model: nn.Module, also: list[str] | None = None) -> dict[str, Tensor]:
    """The tensors of the adapter by name: bottlenecks, new task head, what else requires grad, and those in `also`."""
    bottlenecks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Bottleneck))
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("._extra_state"):  # the range of fixed-point streams: see `ranges_of`
            continue
        is_adapter = name.startswith(bottlenecks) or in_new_head(model, name) or tensor.requires_grad
        if is_adapter or name in (also or ()):
            tensors.setdefault(id(tensor), (name, tensor))  # tied weights are saved once
    return dict(tensors.values())


def _hidden_sizes(model: nn.Module) -> list[int]:
    return sorted({module.down.in_features for module in model.modules() if isinstance(module, Bottleneck)})


def _files(model: nn.Module, note: dict[str, Any]) -> dict[str, bytes]:
    """The contents of the two files of an adapter that is not in peft's wrapper, by name."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_tensors(model).items()}
    tensors |= {name: calibrated.get_extra_state() for name, calibrated in ranges_of(model).items()}
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
        "modules_to_save": sorted({name.split(".")[0] for name in _adapter_tensors(model) if in_new_head(model, name)}),
        "backbone": trained_backbone(model),
        "base_sample": {} if is_quantized(model) else sample_of(model, _adapter_tensors(model)),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return {WEIGHTS: weights, CONFIG: as_json(config)}


def _fill(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Copy the saved tensors into a model that has the method applied.

    Raises UserError, before anything is changed, where a tensor does not fit.
    """
    if config["hidden_sizes"] != _hidden_sizes(model):
        saved, current = (", ".join(map(str, sizes)) for sizes in (config["hidden_sizes"], _hidden_sizes(model)))
        cure = "load it into the model that it was saved from"
        raise UserError(str(folder), f"is for hidden size {saved}, the model's is {current}", cure)
    check_vocabulary(folder, model, config.get("vocabulary"))
    adapter_tensors, ranges = _adapter_tensors(model, also=config["backbone"]), ranges_of(model)
    for name in ranges:
        if name not in tensors:
            what = f"lacks {name!r}, the range of its fixed-point streams"
            raise UserError(str(folder / WEIGHTS), what, "save the adapter again from the model that it was trained on")
        if tensors[name].numel() not in (0, *config["hidden_sizes"]):
            what = f"{name!r} is of {tensors[name].numel()} channels"
            raise UserError(str(folder / WEIGHTS), what, "load it into the model that it was saved from")
    if absent := [name for name in config["backbone"] if name not in adapter_tensors]:
        what = f"says that {absent[0]!r} was trained, which the model has not"
        raise UserError(str(folder / CONFIG), what, "load it into the model that it was saved from")
    if not is_quantized(model):
        warn_of_weights(folder, model, adapter_tensors, config)
    check_tensors(folder, adapter_tensors, {name: tensor for name, tensor in tensors.items() if name not in ranges})
    for name, calibrated in ranges.items():
        calibrated.set_extra_state(tensors[name])
    with torch.no_grad():
        for name, tensor in adapter_tensors.items():
            tensor.copy_(tensors[name])
    for name in config["backbone"]:
        adapter_tensors[name].requires_grad_(True)
