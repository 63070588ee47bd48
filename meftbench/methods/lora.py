"""LoRA through HF peft (Hu et al. 2021)."""

from __future__ import annotations

from torch import nn

from meftbench.methods.applied import Applied, checked_layout
from meftbench.plan.catalogue import Lora


def apply(model: nn.Module, settings: Lora) -> Applied:
    """`model` in peft's wrapper: low-rank updates on the attention projections, and the task head, are trained."""
    from peft import LoraConfig, TaskType, get_peft_model

    layout = checked_layout(model)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or list(layout.attention_targets),
    )
    wrapped: nn.Module = get_peft_model(model, config)
    return Applied(wrapped)
