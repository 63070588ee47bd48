"""The two files of a saved adapter: how they are written, read, and checked against the model."""

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

from meftbench.documents import bytes_of, json_object_of, opened
from meftbench.errors import UserError
from meftbench.methods.applied import vocabulary_of
from meftbench.methods.unloading import and_more
from meftbench.units import GiB

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "MEFTBENCH"
MOST_HEADER_BYTES = 10**8  # that safetensors reads
MOST_BYTES = 64 * GiB  # of a file of weights; those of a whole model of 15B parameters in float32 have as many
SCHEMA = 2  # 1: from before the range of fixed-point streams was calibrated on the model


def base_of_config(model: Any) -> dict[str, str | None]:
    config = model.config
    return {
        "base_model_name_or_path": getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
    }


def check_saved_vocabulary(model: Any, before: int | None, trained: bool) -> None:
    """Raises UserError where the vocabulary was resized after the method was applied and the embeddings are not saved.

    before: rows of the embeddings when the method was applied (None: not known).
    trained: whether the embeddings are trained, so that the file contains them.
    """
    rows = vocabulary_of(model)
    if before is not None and rows != before and not trained:
        what = f"its vocabulary was resized from {before} to {rows}, and the embeddings are not trained, so not saved"
        cure = "resize before apply_method, or train them: get_input_embeddings().weight.requires_grad_(True)"
        raise UserError(type(model).__name__, what, cure)


def check_vocabulary(folder: Path, model: Any, saved: int | None) -> None:
    """Raises UserError where the adapter was saved from a model with a vocabulary of another size.

    saved: rows of that model's embeddings (None: not known).
    """
    rows = vocabulary_of(model)
    if saved is not None and rows is not None and saved != rows:
        cure = f"load it into its own base model, or resize this one first: resize_token_embeddings({saved})"
        raise UserError(str(folder), f"is for a vocabulary of {saved}, the model's is {rows}", cure)


def as_json(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write all `files` (content by name) into `folder`, which is made if needed.

    Each file is first written to the disk under a temporary name in the same folder; then all are renamed.
    Raises UserError: the folder cannot be written.
    """
    is_new, temporary_paths = not folder.exists(), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, temporary_paths[name] = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary_paths[name], 0o644)
        for name, temporary_path in temporary_paths.items():
            os.replace(temporary_path, folder / name)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        for temporary_path in temporary_paths.values():
            Path(temporary_path).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # the folder holds the adapter, or could not be made
                folder.rmdir()


def unwritable(folder: Path | str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(str(folder), f"cannot be written ({reason})", "make room, or choose another folder")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return the configuration, the tensors and the tensors' metadata that a folder holds.

    Raises UserError: the folder or a file is missing, damaged, or of an unknown schema.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "name a folder that save_adapter wrote")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(str(folder), f"holds no {name}", "name a folder that save_adapter wrote")
    cure = "save the adapter again, or take both files from a backup"
    config = json_object_of(folder / CONFIG, cure=cure)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(str(folder / CONFIG), "is no configuration of an adapter", cure)
    if config["peft_type"] == PEFT_TYPE and config.get("schema") not in (1, SCHEMA):
        raise UserError(str(folder / CONFIG), f"is of schema {config.get('schema')!r}", "update meftbench")
    try:
        with opened(folder / WEIGHTS, cure) as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= MOST_HEADER_BYTES:  # told before the whole file is read, which may be large
            raise ValueError(f"it begins with a header of {header_bytes:,} bytes")
        weights = bytes_of(folder / WEIGHTS, MOST_BYTES, cure)
        tensors = safetensors.torch.load(weights)
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    # A damaged file makes safetensors raise errors of other types, too: of an unknown type of numbers a KeyError.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(str(folder / WEIGHTS), f"cannot be read ({error})", cure) from None
    if config.get("weights_sha256", hashlib.sha256(weights).hexdigest()) != hashlib.sha256(weights).hexdigest():
        raise UserError(str(folder / WEIGHTS), f"was not written together with {CONFIG}", cure)
    return config, tensors, header.get("__metadata__") or {}


# --- checks before anything is loaded ---


def check_same(
    folder: Path,
    method: str,
    applied_method: str,
    settings: Mapping[str, Any],
    applied_settings: Mapping[str, Any],
    may_differ: tuple[str, ...],
) -> None:
    """Raises UserError where the model has another method or other settings applied than the adapter was saved with.

    may_differ: settings that are not compared.
    """
    cure = "load it into the pre-trained model: meftbench.unload gives it back"
    if method != applied_method:
        raise UserError(str(folder), f"is an adapter of {method}, the model has {applied_method} applied", cure)
    for key in settings.keys() | applied_settings.keys():
        saved, current = settings.get(key), applied_settings.get(key)
        if key not in may_differ and saved != current:
            raise UserError(str(folder), f"has {key}: {saved}, the model has {key}: {current}", cure)


def warn_of_base(model: nn.Module, config: dict[str, Any]) -> None:
    """Warn where the base model has another name or revision (if both are known) than the adapter was trained on."""
    for key, current in base_of_config(model).items():
        saved = config.get(key)
        if saved != current and (key != "revision" or (saved and current)):
            warnings.warn(f"the adapter was trained on {key} {saved!r}, this model has {current!r}", stacklevel=3)


def sample_of(model: nn.Module, adapter_tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The first four numbers of eight matrices by name, spread over the model: enough to recognise other pre-trained
    weights. Matrices of the adapter, quantised weights and weights without values are left out.

    adapter_tensors: the tensors of the adapter by name.
    """
    frozen = {
        name: tensor
        for name, tensor in model.named_parameters()
        if name not in adapter_tensors and tensor.dim() == 2 and tensor.is_floating_point() and not tensor.is_meta
    }
    names = list(frozen)[:: max(1, len(frozen) // 8)][:8]
    return {name: frozen[name].detach().flatten()[:4].double().tolist() for name in names}


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(number, float) for number in value)


def warn_of_weights(
    folder: Path, model: nn.Module, adapter_tensors: Mapping[str, Tensor], config: dict[str, Any]
) -> None:
    """Warn where the model's weights are not those that the adapter was trained beside.

    Differences as small as those from rounding to another precision are ignored.
    Raises UserError where the sample of the weights in the file is malformed.
    """
    saved, current = config.get("base_sample", {}), sample_of(model, adapter_tensors)
    if not isinstance(saved, dict) or not all(map(_are_numbers, saved.values())):
        what = "base_sample is no mapping of names to lists of numbers"
        raise UserError(str(folder / CONFIG), what, "save the adapter again, or take both files from a backup")
    for name in saved.keys() & current.keys():
        largest = max(map(abs, saved[name]), default=0.0)
        if any(abs(a - b) > 0.02 * largest for a, b in zip(saved[name], current[name], strict=False)):
            what = f"the adapter was trained beside other weights: {name} differs"
            warnings.warn(f"{what}; load it into the pre-trained model that it was saved from", stacklevel=5)
            return


NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(folder: Path, expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raises UserError at the first tensor that is missing, unexpected, of another shape or kind of number, or that
    holds NaN or infinity.

    expected: the tensors of the model.  saved: those of the file.
    """
    where, cure = str(folder / WEIGHTS), "load it into the model that it was saved from"
    if missing := [name for name in expected if name not in saved]:
        raise UserError(where, f"lacks {missing[0]!r}" + and_more(missing, "tensor"), cure)
    if unexpected := [name for name in saved if name not in expected]:
        what = f"holds {unexpected[0]!r}, which the model has not" + and_more(unexpected, "tensor")
        raise UserError(where, what, cure)
    if misshapen := [name for name in expected if saved[name].shape != expected[name].shape]:
        name = misshapen[0]
        what = f"{name!r} is {tuple(saved[name].shape)}, the model's {tuple(expected[name].shape)}"
        raise UserError(where, what + and_more(misshapen, "tensor"), cure)
    for name, tensor in saved.items():
        kind = expected[name].dtype
        if tensor.dtype != kind and (tensor.dtype not in NUMBERS or not kind.is_floating_point):
            what = f"{name!r} is of {str(tensor.dtype).removeprefix('torch.')}, not of floating-point numbers"
            raise UserError(where, what, "save the adapter again, or take both files from a backup")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(where, f"{name!r} holds NaN or infinity", "train it again, at a lower learning rate")
