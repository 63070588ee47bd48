"""LoRA through HF peft (Hu et al. 2021)."""

from __future__ import annotations

from typing import Any

from torch import nn

from meftbench.backbones import base_of, checked_layouts
from meftbench.methods.applied import Applied, predicts_tokens
from meftbench.plan.catalogue import Lora


def apply(model: nn.Module, settings: Lora) -> Applied:
    """`model` in peft's wrapper: low-rank updates on the attention projections, and a new task head, are trained."""
    from peft import LoraConfig, get_peft_model

    layouts = checked_layouts(model)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or sorted({name for layout in layouts for name in layout.attention_targets}),
        **task_of(model),
    )
    wrapped: nn.Module = get_peft_model(model, config)
    return Applied(wrapped)


def task_of(model: Any) -> dict[str, Any]:
    """What peft must know of the model's head: the kind of task, and which modules are new and trained whole."""
    from peft import TaskType

    if predicts_tokens(model):
        kind = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
        return {"task_type": kind}
    base = base_of(model)
    new = [
        name
        for name, child in model.named_children()
        if child is not base and next(child.parameters(), None) is not None
    ]
    # Of the kinds that peft knows, none has images, or several texts a sample.
    classifies = model.main_input_name == "input_ids" and not type(model).__name__.endswith("ForMultipleChoice")
    kind = TaskType.SEQ_CLS if classifies else None
    return {"task_type": kind, "modules_to_save": new}
