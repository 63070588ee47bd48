"""The user's own model: what a function of theirs returns, checked and prepared for a cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from meftbench.errors import UserError
from meftbench.own_code import call, load
from meftbench.plan.factories import OWN_ATTENTION

_RETURNED: WeakSet[nn.Module] = WeakSet()  # the models that users' functions have returned so far

_HEAD_CLASSES = {
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "multiple_choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def build_own(name: str, config: dict[str, Any], *, attention: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """The model that the function `name` returns for the keyword arguments `config`, in training mode.

    The function is called with torch's default dtype set to `dtype` and its random number generator to `seed`; both are
    restored afterwards. Parameters of another floating-point dtype are converted to `dtype`.
    attention: is set in all transformers models inside; `own`: they keep theirs.

    Raises UserError: the function cannot be called; what it returns is no module with parameters, has parameters
    without values or shapes, or was returned before; `attention` is to be set, and there is no transformers model
    inside, or one that does not support it.
    """
    with torch.random.fork_rng(devices=[]), _default_dtype(dtype):
        load(name)  # an import may draw random numbers
        torch.manual_seed(seed)
        on_meta = torch.get_default_device().type == "meta"  # for a prediction, which needs no values of weights
        model = call(name, **config)
    if not isinstance(model, nn.Module):
        raise UserError(name, f"returned {type(model).__name__}, no torch module", "return a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise UserError(name, f"returned {type(model).__name__}, which has no parameters", "return one to be trained")
    if not on_meta and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(name, f"returned {type(model).__name__}, whose weights have no values (meta)", "load them")
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        what = f"returned {type(model).__name__}, which has parameters without a shape yet (LazyLinear)"
        raise UserError(name, what, "run a batch through it first")
    if model in _RETURNED:
        raise UserError(name, "returned the model that it has returned before", "make a new one in each call")
    _RETURNED.add(model)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    inner_models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if attention != OWN_ATTENTION:
        _set_attention(name, inner_models, attention)
    return model.train()


def transformers_part(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformers model in `model`, perhaps itself; None: there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def head_of_own(model: nn.Module) -> str | None:
    """The head of a transformers model, a name from catalogue.HEADS, known by its class; None: the class is in none of
    transformers' lists, or it is no transformers model."""
    if not isinstance(model, PreTrainedModel):
        return None
    classes = {kind.__name__ for kind in type(model).__mro__}
    for head, mapping in _HEAD_CLASSES.items():
        for names in getattr(modeling_auto, mapping).values():
            if classes & ({names} if isinstance(names, str) else {*names}):
                return head
    return None


def _set_attention(name: str, models: list[PreTrainedModel], attention: str) -> None:
    if not models:
        raise UserError(name, "gives a model whose attention is its own", "leave attention out")
    for model in models:
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(name, f"gives a model without attention {attention} ({reason})", "leave it out") from None
        if model.config._attn_implementation != attention:
            what = f"gives {type(model).__name__}, whose attention cannot be set"
            raise UserError(name, what, "leave attention out")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
