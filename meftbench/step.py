"""The one training step that every method runs: forward, loss, backward, optimizer step, zero_grad (DESIGN 4).

No method is named here. What differs between methods is in the model, and in what is entered around its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.backbones.quantize import quantize
from meftbench.batch import resident_batch
from meftbench.methods import Applied, prepare
from meftbench.plan.cell import Cell

PHASES = ("forward", "backward", "optimizer")
Mark = Callable[[str], None]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
# Arguments of torch's optimizers for a cell's `optimizer_impl`.
OPTIMIZER_IMPLEMENTATIONS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}  # over float32 weights


def _unmarked(phase: str) -> None:
    """The step is not observed."""


@dataclass
class Step:
    """A model under a method, its optimizer and a resident batch.

    batch: arguments of the model's forward by name, each with B samples in its first dimension.
    sequence_length: positions of a sample, where the batch has no mask that says so.
    micro_batch_size: samples a forward; losses are weighted so that gradients are those of the whole batch.
    autocast: dtype of the autocast region around forward and loss; None: no region.
    scaler: scales the loss, as fp16 needs; None: it is not. `forward_backward` leaves gradients scaled.
    phase: the phase that runs now, for whoever must say where something happened.  steps_run: steps finished.
    """

    applied: Applied
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    micro_batch_size: int
    device: torch.device
    sequence_length: int = 0
    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    phase: str = "load"
    steps_run: int = 0

    @property
    def model(self) -> nn.Module:
        return self.applied.model

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.batch.values())))

    @property
    def tokens(self) -> int:
        """Tokens of the batch that are not padding; of images: patches and special tokens."""
        mask = self.batch.get("attention_mask")
        return self.batch_size * self.sequence_length if mask is None else int(mask.sum())

    def run(self, mark: Mark = _unmarked) -> float:
        """One step; the loss of the batch. `mark` is called with a phase's name when it begins, and with "end"."""
        loss = self.forward_backward(mark)
        self._enter("optimizer", mark)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # set_to_none: gradients kept as zeros would live through the next forward (MEASURING 5, no. 3).
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", mark)
        self.steps_run += 1
        return float(loss)

    def forward_backward(self, mark: Mark = _unmarked) -> Tensor:
        """Forward, loss and backward over all micro-batches; gradients are left in the parameters."""
        total: Tensor | None = None
        for start in range(0, self.batch_size, self.micro_batch_size):
            self._enter("forward", mark)
            loss = self._forward(start)
            self._enter("backward", mark)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
            del loss
        assert total is not None
        return total

    def loss(self) -> float:
        """Loss of the batch from forward passes alone, over all micro-batches, in the mode the model is in."""
        return float(sum(float(self._forward(start)) for start in range(0, self.batch_size, self.micro_batch_size)))

    def _forward(self, start: int) -> Tensor:
        stop = min(start + self.micro_batch_size, self.batch_size)
        samples = self._samples(start, stop)
        with self.applied.around_forward(), self.autocast_region():
            loss = self.loss_of(samples)
            return loss * ((stop - start) / self.batch_size) if stop - start < self.batch_size else loss

    def loss_of(self, samples: dict[str, Tensor]) -> Tensor:
        """The model's loss (a scalar) of some samples of the batch."""
        loss: Tensor = self.model(**samples).loss
        return loss

    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: tensor[start:stop] for name, tensor in self.batch.items()}

    def autocast_region(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return ExitStack()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _enter(self, phase: str, mark: Mark) -> None:
        self.phase = phase
        mark(phase)


def build_step(cell: Cell, device: torch.device, padding: float = 0.0) -> Step:
    """The step of a cell: everything from its seed, model and method built on the CPU, then moved to `device`.

    padding: share of each sequence that is padding.
    Raises UserError: the model cannot be loaded, the method does not fit it.
    """
    autocast = AUTOCAST.get(cell.precision)
    dtype = torch.float32 if autocast else DTYPES[cell.precision]
    model = build_model(
        cell.model,
        cell.model_config_overrides,
        attention=cell.attention_requested,
        dtype=dtype,
        seed=cell.seed,
        head=cell.head,
    )
    model.config.use_cache = False  # type: ignore[union-attr]  # a training step reads no cache, and a decoder would fill one
    if cell.precision == "nf4":
        quantize(model)
    method = "+".join([cell.method, *cell.levers.names()])
    applied = prepare(model, method, cell.method_params, seed=cell.seed)
    applied.model.to(device)
    return Step(
        applied=applied,
        optimizer=build_optimizer(cell, list(applied.trained().values())),
        batch=resident_batch(
            model,
            cell.batch_size,
            cell.sequence_length,
            device,
            text_from=tokenizer_of(cell.model),
            padding=padding,
            seed=cell.seed,
        ),
        micro_batch_size=cell.micro_batch_size,
        device=device,
        sequence_length=cell.sequence_length,
        autocast=autocast,
        scaler=torch.amp.GradScaler(device.type) if autocast == torch.float16 else None,
    )


def build_optimizer(cell: Cell, parameters: list[nn.Parameter], foreach: bool | None = None) -> torch.optim.Optimizer:
    """The cell's optimizer; the learning rate is small enough that random labels do not drive weights away.

    foreach: the implementation where the cell names none; None: torch chooses by the device.
    """
    options = OPTIMIZER_IMPLEMENTATIONS[cell.optimizer_impl] if cell.optimizer_impl else {"foreach": foreach}
    if cell.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4, **options)
    return torch.optim.AdamW(parameters, lr=1e-4, **options)
