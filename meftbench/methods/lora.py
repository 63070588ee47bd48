"""LoRA through HF peft (Hu et al. 2021), and LoRA-FA, which freezes its first factor (Zhang et al. 2023)."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from meftbench.backbones import base_of, checked_layouts
from meftbench.catalogue.methods import Lora, LoraFA
from meftbench.errors import UserError, one_line
from meftbench.methods.applied import Applied, predicts_tokens
from meftbench.methods.peft_model import freeze_first_factors, wrapped_by_peft


def apply(model: nn.Module, settings: Lora) -> Applied:
    """`model` in peft's wrapper: low-rank updates on the attention projections, and a new task head, are trained.

    Raises UserError: peft refuses a setting, such as targets that the model does not have.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.targets),
        **task_of(model),
    )
    try:
        wrapped = wrapped_by_peft(model, config)
    except ValueError as error:
        raise UserError(
            "lora", f"peft refuses it on {type(model).__name__}: {one_line(error).rstrip('.')}", "change its settings"
        ) from None
    return Applied(wrapped)


def apply_fa(model: nn.Module, settings: LoraFA) -> Applied:
    """As `apply`, with the first factor A of every update frozen: B and a new task head are trained.

    Raises UserError as `apply` does.
    """
    applied = apply(model, settings)
    freeze_first_factors(applied.model)
    return applied


def _targets(model: Any, requested: list[str] | None) -> list[str]:
    """Names of the projections to adapt: the requested ones; else those of attention by the model's layouts; else those
    that peft names for the model type.

    Raises UserError where none are known, or where the model is no transformers model.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if requested and hasattr(model, "config"):
        return requested
    try:
        return sorted({name for layout in checked_layouts(model) for name in layout.attention_targets})
    except UserError as error:
        if not hasattr(model, "config"):
            raise
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(getattr(model.config, "model_type", None))
        if not isinstance(known, list):
            raise UserError(error.where, error.what, f"name its projections, targets=[...], or {error.cure}") from None
        return known


def task_of(model: Any) -> dict[str, Any]:
    """Fields of peft's configuration about the model's head: the task type, and the new modules, trained in full.

    The task type is None where none of peft's fits, or where the model's forward does not take the arguments that peft
    would add to a call. peft then passes calls on unchanged.
    """
    base = base_of(model)
    task_type = _task_type(model, base)
    fields: dict[str, Any] = {"task_type": task_type if task_type and _takes_what_peft_adds(model) else None}
    if not predicts_tokens(model) and base is not model:
        fields["modules_to_save"] = [
            name
            for name, child in model.named_children()
            if child is not base and next(child.parameters(), None) is not None
        ]
    return fields


def _task_type(model: Any, base: nn.Module) -> Any:
    from peft import TaskType

    if predicts_tokens(model):
        if not hasattr(model, "prepare_inputs_for_generation"):  # masked language model: peft has no task type
            return None
        return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    if model.main_input_name != "input_ids":  # images
        return None
    if base is model:
        return TaskType.FEATURE_EXTRACTION
    types = {
        "ForMultipleChoice": None,  # a sample consists of several texts
        "ForTokenClassification": TaskType.TOKEN_CLS,
        "ForQuestionAnswering": TaskType.QUESTION_ANS,
    }
    names = [ancestor.__name__ for ancestor in type(model).__mro__]
    return next((types[end] for end in types if any(name.endswith(end) for name in names)), TaskType.SEQ_CLS)


# The arguments that peft's wrapper for a task type always passes on to the model.
_ADDED = ("attention_mask", "inputs_embeds", "output_attentions", "output_hidden_states", "return_dict")


def _takes_what_peft_adds(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return all(name in parameters for name in _ADDED) or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
