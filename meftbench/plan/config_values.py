"""Refuses values of a model's configuration that no model can have, before a worker process is started.

What a field may be follows from its name. transformers accepts any value, and fails later inside the model.
"""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import Any

from meftbench.errors import UserError
from meftbench.strict_yaml import Document, KeyPath

# Sizes and counts. Some of them may be 0 (type_vocab_size of BERT) or None (a window).
_COUNTS = re.compile(
    r"(^num_.*|.*_(size|layers|heads|dim|positions|position_embeddings|rank|experts|channels)|^(n_embd|d_model)$)"
)
_MAY_BE_NONE = re.compile(r".*(window|vocab_size_per_layer|head_dim|key_value_heads|_embed_proj_dim|chunk).*")
_PROBABILITIES = re.compile(r"(?!norm_).*(dropout|dropout_prob|_prob|layerdrop)$")
_NUMBERS = re.compile(r".*(_eps|_epsilon|initializer_range|_theta|_coef|_scalar|_multiplier|softcapping)$")
LARGEST_SIZE = 2**24  # the longest context of a published model has 10,485,760 positions
# The training step reads the loss by its name, which needs return_dict; problem_type decides what the labels are.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "return_dict": (True,),
    "use_return_dict": (True,),
    "problem_type": ("regression", "single_label_classification", "multi_label_classification"),
}
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
# Names of activations in transformers that models use. Another name is refused only where it resembles one of them.
_KNOWN_ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "swish", "tanh", "mish", "leaky_relu", "laplace", "linear", "selu",
)  # fmt: skip


def check_values(document: Document, path: KeyPath, overrides: dict[str, Any]) -> None:
    """Check the values of `overrides`, fields of a model's configuration at `path` of the document.

    Raises UserError: at the first field whose value is of the wrong kind or out of its range.
    """
    for key, value in overrides.items():
        what = _allowed_instead(key, value)
        if what:
            raise document.error((*path, key), f"config {key} is {value!r}", f"write {what}")
    heads, hidden = overrides.get("num_attention_heads"), overrides.get("hidden_size")
    if heads and hidden and "head_dim" not in overrides and hidden % heads:
        what = f"config hidden_size {hidden} is no multiple of {heads} heads"
        raise document.error((*path, "hidden_size"), what, "write a multiple of it")


def check_sizes(where: str, config: dict[str, Any]) -> None:
    """Raises UserError: a size or count in the configuration of a model folder is larger than any model has, so that
    building the model would not end."""
    for key, value in config.items():
        if _COUNTS.fullmatch(key) and type(value) is int and value > _most(key):
            raise UserError(where, f"its config.json has {key} {value:,}", f"write at most {_most(key):,}")


def _most(key: str) -> int:
    return 10_000 if "layers" in key else LARGEST_SIZE


def _allowed_instead(key: str, value: Any) -> str | None:
    """What to write instead of a wrong value; None: the value is not known to be wrong."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _ALLOWED:
        return None if value in _ALLOWED[key] else f"{' or '.join(map(repr, _ALLOWED[key]))}, or leave it out"
    if key in _ACTIVATIONS:
        nearest = get_close_matches(str(value), _KNOWN_ACTIVATIONS, n=1)
        if not isinstance(value, str) or (value not in _KNOWN_ACTIVATIONS and nearest):
            return f"{nearest[0]!r}" if nearest else "the name of an activation, such as gelu"
        return None
    if _COUNTS.fullmatch(key):
        if value is None and _MAY_BE_NONE.fullmatch(key):
            return None
        least = 0 if key == "type_vocab_size" or "experts" in key else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _most(key):
            return f"a whole number from {least} to {_most(key):,}"
    elif _PROBABILITIES.fullmatch(key) and value is not None and not (is_number and 0 <= value <= 1):
        return "a number from 0 to 1"
    elif _NUMBERS.fullmatch(key) and value is not None and not (is_number and math.isfinite(value)):
        return "a number, such as 1.0e-5"
    return None
