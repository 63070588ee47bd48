"""The one training step that every method runs: forward, loss, backward, optimizer step, zero_grad (docs/design.md 6).

Methods are not distinguished here: they differ in the model, and in the contexts around its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meftbench.errors import UserError, one_line
from meftbench.methods import Applied
from meftbench.methods.mezo import ForwardOnly

if TYPE_CHECKING:
    from meftbench.measuring.sharing import Sharing

PHASES = ("forward", "backward", "optimizer")
Mark = Callable[[str], None]


def _unmarked(phase: str) -> None:
    """The default of `mark`, for a step that is not observed."""


@dataclass
class Step:
    """A model with a method, its optimizer and a resident batch.

    batch: arguments of the model's forward by name, each with B samples in its first dimension.
    sequence_length: positions of a sample, where the batch has no mask that says so.
    micro_batch_size: samples of one forward pass; losses are weighted so that gradients are those of the whole batch.
    autocast: dtype of the autocast region around forward and loss; None: no region.
    scaler: scales the loss, as fp16 needs; None: no scaling. `forward_backward` leaves gradients scaled.
    constants: arguments of the forward that are the same for all samples.
    sharing: how the step is shared with other processes; None: there is one process.
    phase: the phase that runs now, to report where something happened.
    steps_run: steps finished.  last_loss: the loss of the last of them; None before the first.
    """

    applied: Applied
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    micro_batch_size: int
    device: torch.device
    sequence_length: int = 0
    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    sharing: Sharing | None = None
    phase: str = "load"
    steps_run: int = 0
    last_loss: float | None = None

    @property
    def model(self) -> nn.Module:
        return self.applied.model

    @property
    def called(self) -> nn.Module:
        """What is called in place of the model: DDP's wrapper around it, or the model itself."""
        return self.model if self.sharing is None else self.sharing.called

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.batch.values())))

    @property
    def tokens(self) -> int:
        """Tokens of the batch that are not padding; of images: patches and special tokens."""
        mask = self.batch.get("attention_mask")
        return self.batch_size * self.sequence_length if mask is None else int(mask.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, without padding."""
        mask = self.batch.get("attention_mask")
        return self.sequence_length if mask is None else int(mask.sum(1).max())

    def run(self, mark: Mark = _unmarked) -> float:
        """One step; the loss of the batch. `mark` is called with a phase's name when it begins, and with "end"."""
        with self.applied.around_training_step():
            loss = self.forward_backward(mark)
        self._enter("optimizer", mark)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # set_to_none: gradients kept as zeros would live through the next forward (docs/measuring.md 4).
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", mark)
        self.steps_run += 1
        self.last_loss = float(loss)
        return self.last_loss

    def forward_backward(self, mark: Mark = _unmarked) -> Tensor:
        """Forward, loss and backward over all micro-batches; gradients are left in the parameters.

        (`run` enters `applied.around_training_step` first, in which a lever may take them.)

        An optimizer that needs none (MeZO's) gets its estimate from forward passes; the backward phase is empty then.
        """
        if isinstance(self.optimizer, ForwardOnly):
            self._enter("forward", mark)
            with self.applied.without_gradients():
                estimate = self.optimizer.estimate(self._total)
            self._enter("backward", mark)
            return estimate
        total: Tensor | None = None
        for start in range(0, self.batch_size, self.micro_batch_size):
            with self._micro_batch(start):
                self._enter("forward", mark)
                loss = self._forward(start)
                self._enter("backward", mark)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
            del loss
        assert total is not None
        return total

    def _micro_batch(self, start: int) -> AbstractContextManager[object]:
        """Entered around forward and backward of the micro-batch that begins with sample `start`."""
        last = start + self.micro_batch_size >= self.batch_size
        return ExitStack() if self.sharing is None else self.sharing.micro_batch(last)

    def loss(self) -> float:
        """Loss of the batch from forward passes alone, over all micro-batches, in the mode the model is in."""
        return float(self._total())

    def _total(self) -> Tensor:
        """The same as a tensor (a scalar)."""
        starts = range(0, self.batch_size, self.micro_batch_size)
        return torch.stack([self._forward(start).detach() for start in starts]).sum()

    def _forward(self, start: int) -> Tensor:
        stop = min(start + self.micro_batch_size, self.batch_size)
        samples = self._samples(start, stop)
        with self.applied.around_forward(), self.autocast_region():
            loss = self.loss_of(samples)
            return loss * ((stop - start) / self.batch_size) if stop - start < self.batch_size else loss

    def loss_of(self, samples: dict[str, Tensor]) -> Tensor:
        """The model's loss (a scalar) of some samples of the batch."""
        loss: Tensor = self.called(**samples).loss
        return loss

    def whole(self) -> dict[str, Any]:
        """The arguments of forward for the whole batch at once, and those that are the same for all samples."""
        return {**self._samples(0, self.batch_size), **self.constants}

    @property
    def labels_at_once(self) -> int:
        """Positions in the labels of one micro-batch; 0: there are no labels."""
        labels = self._samples(0, self.micro_batch_size).get("labels")
        return 0 if labels is None else labels.numel()

    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: tensor[start:stop] for name, tensor in self.batch.items()}

    def autocast_region(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return ExitStack()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _enter(self, phase: str, mark: Mark) -> None:
        self.phase = phase
        mark(phase)


def broken_loss(loss: float | None) -> str | None:
    """A sentence about a loss that is not finite; None where it is finite, or there is none."""
    if loss is None or math.isfinite(loss):
        return None
    return f"the loss is {loss}: weights, inputs or labels are not finite, or overflow in this precision"


class OwnStep(Step):
    """A step of the user's own model or batch: forward may return the loss in any of several forms."""

    def loss_of(self, samples: dict[str, Tensor]) -> Tensor:
        """Raises UserError: the model does not take the batch, gives no loss, or not one number."""
        where = type(self.model).__name__
        try:
            output = self.called(**samples, **self.constants)
        except TypeError as error:
            names = ", ".join([*samples, *self.constants])
            raise UserError(where, f"does not take the batch ({names}): {one_line(error)}", "mend the batch") from error
        loss = _loss_in(output)
        if not isinstance(loss, Tensor):
            cure = "put `labels` into the batch, or give a model whose forward returns a loss"
            raise UserError(where, f"gives no loss but {type(output).__name__}", cure)
        if loss.numel() != 1 or not loss.is_floating_point():
            what = f"its loss is {str(loss.dtype).removeprefix('torch.')} {tuple(loss.shape)}, not one number"
            raise UserError(where, what, "give one loss of the batch, such as its mean")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise UserError(where, "its loss needs no gradient", "train a tensor that it depends on")
        return loss.reshape(())


def _loss_in(output: Any) -> Any:
    """The loss in what forward returned: under "loss", the first item, the tensor itself, or the attribute `loss`."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "loss", None)
