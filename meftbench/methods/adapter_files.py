"""The two files of a saved adapter: written whole or not at all, read, and held against the model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meftbench.errors import UserError
from meftbench.methods.applied import vocabulary_of
from meftbench.methods.unloading import and_more

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "MEFTBENCH"
SCHEMA = 2  # 1: before streams took their range from the model


def base_of_config(model: Any) -> dict[str, str | None]:
    config = model.config
    return {
        "base_model_name_or_path": getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
    }


def check_saved_vocabulary(model: Any, before: int | None, trained: bool) -> None:
    """Raises UserError where the vocabulary was resized after the method was applied and its rows are not in the file.

    before: rows when the method was applied (None: not noted).  trained: the file has the embeddings.
    """
    rows = vocabulary_of(model)
    if before is not None and rows != before and not trained:
        what = f"its vocabulary was resized from {before} to {rows}, and the embeddings are not trained, so not saved"
        cure = "resize before apply_method, or train them: get_input_embeddings().weight.requires_grad_(True)"
        raise UserError(type(model).__name__, what, cure)


def check_vocabulary(folder: Path, model: Any, saved: int | None) -> None:
    """Raises UserError where the adapter was saved from a model with another vocabulary (None: not noted)."""
    rows = vocabulary_of(model)
    if saved is not None and rows is not None and saved != rows:
        cure = f"load it into its own base model, or resize this one first: resize_token_embeddings({saved})"
        raise UserError(str(folder), f"is for a vocabulary of {saved}, the model's is {rows}", cure)


def as_json(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def write(folder: Path, files: dict[str, bytes]) -> None:
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
        raise unwritable(folder, error) from None
    finally:
        for temporary in beside.values():
            Path(temporary).unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it holds the adapter, or was not made
                folder.rmdir()


def unwritable(folder: Path | str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(str(folder), f"cannot be written ({reason})", "make room, or choose another folder")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors and the tensors' metadata of a folder. Raises UserError: not there, damaged, of a newer
    schema."""
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
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(str(folder / WEIGHTS), f"cannot be read ({error})", again) from None
    if config.get("weights_sha256", hashlib.sha256(weights).hexdigest()) != hashlib.sha256(weights).hexdigest():
        raise UserError(str(folder / WEIGHTS), f"was not written together with {CONFIG}", again)
    return config, tensors, header.get("__metadata__") or {}


# --- checks before anything is loaded ---


def check_same(
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


def warn_of_base(model: nn.Module, config: dict[str, Any]) -> None:
    for key, found in base_of_config(model).items():
        saved = config.get(key)
        if saved != found and (key != "revision" or (saved and found)):
            warnings.warn(f"the adapter was trained on {key} {saved!r}, this model has {found!r}", stacklevel=3)


def sample_of(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The first four numbers of eight matrices that are not of the adapter, by name, spread over the model: enough to
    tell other pre-trained weights. None of weights that are quantised, or have no values.

    own: what is of the adapter.
    """
    frozen = {
        name: tensor
        for name, tensor in model.named_parameters()
        if name not in own and tensor.dim() == 2 and tensor.is_floating_point() and not tensor.is_meta
    }
    names = list(frozen)[:: max(1, len(frozen) // 8)][:8]
    return {name: frozen[name].detach().flatten()[:4].double().tolist() for name in names}


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(number, float) for number in value)


def warn_of_weights(folder: Path, model: nn.Module, own: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Warns where the model's weights are not those that the adapter was trained beside, rounding to another precision
    left aside. Raises UserError where the file's sample of them is none."""
    saved, found = config.get("base_sample", {}), sample_of(model, own)
    if not isinstance(saved, dict) or not all(map(_are_numbers, saved.values())):
        what = "base_sample is no mapping of names to lists of numbers"
        raise UserError(str(folder / CONFIG), what, "save the adapter again, or take both files from a backup")
    for name in saved.keys() & found.keys():
        largest = max(map(abs, saved[name]), default=0.0)
        if any(abs(a - b) > 0.02 * largest for a, b in zip(saved[name], found[name], strict=False)):
            what = f"the adapter was trained beside other weights: {name} differs"
            warnings.warn(f"{what}; load it into the pre-trained model that it was saved from", stacklevel=5)
            return


NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises UserError at the first tensor that is missing, unexpected, of another shape or kind of number, or that
    holds NaN or infinity."""
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
    for name, tensor in found.items():
        kind = expected[name].dtype
        if tensor.dtype != kind and (tensor.dtype not in NUMBERS or not kind.is_floating_point):
            what = f"{name!r} is of {str(tensor.dtype).removeprefix('torch.')}, not of floating-point numbers"
            raise UserError(where, what, "save the adapter again, or take both files from a backup")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(where, f"{name!r} holds NaN or infinity", "train it again, at a lower learning rate")
