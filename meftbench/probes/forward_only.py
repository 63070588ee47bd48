"""Whether a step without a backward pass (MeZO's) did what it is for: no graph, no gradients, and other weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from meftbench.measuring.step import Step


class ForwardOnlyStep:
    """Entered around the forward passes of a step; `missing` then takes the step of its optimizer."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls: Counter[nn.Module] = Counter()
        self._with_graph = 0
        self._hooks: list[Any] = []
        self._before = self._sums()

    def __enter__(self) -> None:
        for module in self._step.model.modules():
            if isinstance(module, nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._note))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, *_: Any) -> None:
        self._calls[module] += 1
        self._with_graph += torch.is_grad_enabled()

    @property
    def passes(self) -> float:
        """How many forward passes there were for each micro-batch; a lever may run some modules in pieces."""
        micro_batches = -(-self._step.batch_size // self._step.micro_batch_size)
        return min(self._calls.values(), default=0) / micro_batches

    def missing(self) -> str | None:
        """The fact that shows that the step was not one without a backward pass, or moved nothing; None: it was."""
        if self._with_graph:
            return f"{self._with_graph} of {self._calls.total()} projections ran with gradients enabled"
        for name, parameter in self._step.model.named_parameters():
            if parameter.grad is not None:
                return f"{name} got a gradient"
        self._step.optimizer.step()
        return None if self._sums() != self._before else "no weight has moved"

    def _sums(self) -> list[float]:
        """The sum of each trained tensor: a copy might not fit the device."""
        return [float(p.detach().sum(dtype=torch.float64)) for p in self._step.applied.trained().values()]
