"""Full fine-tuning: every weight that is not frozen is trained."""

from __future__ import annotations

from torch import nn

from meftbench.catalogue.methods import Full
from meftbench.errors import UserError
from meftbench.methods.applied import Applied


def apply(model: nn.Module, settings: Full) -> Applied:
    """Leave `model` as it is: what requires grad is trained, which is everything unless a part was frozen before."""
    return Applied(model)


def check_some_trained(model: nn.Module) -> None:
    """Raises UserError where all parameters are frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        cure = "train some of them: requires_grad_(True), or take another method"
        raise UserError(type(model).__name__, "all its parameters are frozen", cure)
