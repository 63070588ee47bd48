"""Callbacks of transformers.Trainer: a clock of the training steps, and the steps after which to evaluate."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class StepClock(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sums seconds and tokens of the training steps, without evaluation; checkpoints store and restore the sums."""

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self.seconds, self.tokens = seconds, tokens
        self._begin = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds, "tokens": self.tokens}, "attributes": {}}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += _now() - self._begin


def _now() -> float:
    """Seconds of a clock that is read after all queued work of the GPU is done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class EvaluateAt(TrainerCallback):  # type: ignore[misc]
    """Scores validation and writes a checkpoint after each of these optimizer steps."""

    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate = control.should_save = state.global_step in self.steps
        return control
