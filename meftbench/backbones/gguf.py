"""Weights from a GGUF file: transformers reads and dequantizes them once, and they are kept as a model folder."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from meftbench.backbones.gguf_header import check_config, check_weights, completed, read_header
from meftbench.errors import UserError
from meftbench.plan.gguf_files import cache_folder, check_gguf

# By GGUF file: temporary folders of this process, used where the cache cannot be written.
_TEMPORARY: dict[Path, tempfile.TemporaryDirectory[str]] = {}


def dequantized(name: str, file: Path) -> Path:
    """A model folder with the dequantized float32 weights of a GGUF file, its configuration and its tokenizer.

    It is made at the first call and kept in the cache (plan/gguf_files.py). If the cache cannot be written, it is a
    temporary folder of this process, and a warning is given.  name: what the user calls the model, for errors.

    Raises UserError: it is no GGUF file, it is damaged, transformers cannot read its architecture from GGUF files, or
    would leave out a part of the model.
    """
    check_gguf(name, file)
    if file in _TEMPORARY:
        return Path(_TEMPORARY[file].name)
    folder = cache_folder(file)
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():
                _make(name, file, folder)
    except OSError as error:
        warnings.warn(f"{folder} cannot be written ({error}); the weights of {file.name} are not kept", stacklevel=2)
        temporary = tempfile.TemporaryDirectory(prefix="meftbench-gguf-")
        _write(name, file, Path(temporary.name))
        _TEMPORARY[file] = temporary  # only now: a second call must not find half a folder
        return Path(temporary.name)
    return folder


def _make(name: str, file: Path, folder: Path) -> None:
    """Write the folder completely or not at all: its files are written to a folder next to it, which is then renamed.
    If `folder` already exists, it has no configuration: it is damaged, and is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write(name, file, unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # after a successful rename it no longer exists


def _write(name: str, file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = _read(name, file)
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it, transformers refuses to save the model as quantized
    config.name_or_path = file.name
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    try:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors reports that a file cannot be written
        raise OSError(str(error)) from None


def _read(name: str, file: Path) -> tuple[Any, Any]:
    """Model and tokenizer of the file, after a check against its header. Raises UserError as `dequantized` does."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        header = read_header(name, file)
        config = completed(AutoConfig.from_pretrained(**source), header)
        check_config(name, header, config)
        gguf_config: Any = getattr(transformers, "GgufConfig", None)  # newer versions may leave the weights quantized
        if gguf_config is not None:
            source["quantization_config"] = gguf_config(dequantize=True)
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.float32, output_loading_info=True
        )
        source.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except UserError:
        raise
    except Exception as error:  # on a damaged file, gguf and transformers raise errors of many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"{str(file)!r} cannot be read as a model ({reason})"
        cure = "check that the file is whole and of an architecture that transformers knows"
        raise UserError(name, what, cure) from None
    check_weights(name, header, model, set(loading["missing_keys"]))
    return model, tokenizer
