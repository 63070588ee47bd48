"""Optimizers by name, and how torch runs those of its own: one table for measured, counted and predicted steps and for
trainings on tasks, so that all take the same class with the same arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Optimizer:
    """An optimizer: the class that transformers' Trainer takes for it, or for the same with other states.

    home: "module:Class".  summary: one sentence.  arguments: those that differ from the class's own defaults.
    adam: which of Adam's settings (betas, eps) the class takes; a training on a task gives them.
    implementations: whether torch has several implementations of its step (`optimizer_impl`).
    keeps_state: whether it keeps anything from one step to the next.  replaces_state: whether a step replaces tensors
        of its state by new ones, so that a later step is not a repetition of the one before.
    paged: whether its larger states lie in CUDA's unified memory, which the driver moves between device and host.
    """

    home: str
    summary: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    adam: tuple[str, ...] = ()
    implementations: bool = False
    keeps_state: bool = True
    replaces_state: bool = False
    paged: bool = False

    @property
    def of_bitsandbytes(self) -> bool:
        return self.home.startswith("bitsandbytes.")


_ADAM = ("betas", "eps")

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        "torch.optim:AdamW",
        "torch's AdamW: two states of the weights' dtype for each weight",
        adam=_ADAM,
        implementations=True,
    ),
    "adamw-8bit": Optimizer(
        "bitsandbytes.optim:AdamW8bit",
        "bitsandbytes' AdamW with two states of 8 bits for each weight; of embeddings and of tensors below 4,096 "
        "elements 32 bits, as in transformers' Trainer",
        adam=_ADAM,
    ),
    "paged-adamw": Optimizer(
        "bitsandbytes.optim:PagedAdamW32bit",
        "bitsandbytes' AdamW with float32 states, those of tensors from 100,000 elements on in unified memory, which "
        "CUDA moves to the host where the device is full",
        adam=_ADAM,
        paged=True,
    ),
    "paged-adamw-8bit": Optimizer(
        "bitsandbytes.optim:PagedAdamW8bit",
        "adamw-8bit with the states of tensors from 100,000 elements on in unified memory, as of paged-adamw",
        adam=_ADAM,
        paged=True,
    ),
    "lion": Optimizer(
        "bitsandbytes.optim:Lion32bit",
        "Lion (Chen et al. 2023) of bitsandbytes: the sign of a momentum, one float32 state for each weight",
        adam=("betas",),
    ),
    "lion-8bit": Optimizer(
        "bitsandbytes.optim:Lion8bit",
        "Lion with a state of 8 bits; of embeddings and of tensors below 4,096 elements 32 bits",
        adam=("betas",),
    ),
    "adafactor": Optimizer(
        "transformers.optimization:Adafactor",
        "Adafactor (Shazeer and Stern 2018) of transformers at the given learning rate: of a matrix one state for each "
        "row and one for each column",
        # As Trainer sets it: the learning rate is the one of the schedule, not one that Adafactor derives.
        arguments={"scale_parameter": False, "relative_step": False},
        replaces_state=True,
    ),
    "sgd": Optimizer(
        "torch.optim:SGD", "torch's SGD without momentum: no state", implementations=True, keeps_state=False
    ),
    "sgd-momentum": Optimizer(
        "torch.optim:SGD",
        "torch's SGD with a momentum of 0.9: one state of the weights' dtype for each weight",
        arguments={"momentum": 0.9},
        implementations=True,
    ),
}
# How torch runs an optimizer's step: several tensors at a time, one kernel, or a loop over parameters.
OPTIMIZER_IMPLEMENTATIONS: dict[str, str] = {
    "foreach": "several tensors at a time; temporaries as large as the gradients",
    "fused": "one kernel for all",
    "loop": "one tensor after the other",
}
