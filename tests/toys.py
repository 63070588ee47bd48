"""A method, a backbone and a probe as CONTRIBUTING.md says one adds them: one file, this one."""

from __future__ import annotations

from dataclasses import replace

from meftbench.backbones.bert import BERT
from meftbench.catalogue.settings import Settings
from meftbench.methods.applied import Applied
from meftbench.probes.subject import Subject
from meftbench.records.record import Metric


class BitFit(Settings):
    """Train bias vectors only (Ben Zaken et al. 2022)."""

    head: bool = True


def apply_bitfit(model, settings: BitFit) -> Applied:
    """Freeze everything but biases, and the head if asked."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or (settings.head and name.startswith("classifier")))
    return Applied(model)


# ELECTRA's encoder is BERT's.
ELECTRA = replace(BERT, attention_targets=("query",))


def count_steps(subject: Subject) -> dict[str, Metric]:
    """How many steps the cell had run when the probe came."""
    return {"steps_before": Metric(subject.step.steps_run, "counted")}
