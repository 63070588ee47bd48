"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from torch import nn

from meftbench.methods.applied import Applied
from meftbench.plan.catalogue import Full


def apply(model: nn.Module, settings: Full) -> Applied:
    """`model` as it is, all parameters trained."""
    train_all(model)
    return Applied(model)


def train_all(model: nn.Module) -> None:
    for parameter in model.parameters():
        # 4-bit weights cannot be trained, nor integers of other quantisers.
        parameter.requires_grad_(parameter.is_floating_point() and not hasattr(parameter, "quant_state"))
