"""The one training step that every method runs: forward, loss, backward, optimizer step, zero_grad (docs/design.md 6).

No method is named here. What differs between methods is in the model, and in what is entered around its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.backbones.own import head_of_own, transformers_part
from meftbench.backbones.quantize import quantize
from meftbench.batch import own_batch, resident_batch
from meftbench.errors import UserError, one_line
from meftbench.methods import Applied, prepare
from meftbench.plan.cell import Cell
from meftbench.plan.factories import OWN_ATTENTION, is_factory

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
    constants: arguments of the forward that are the same for all samples.
    phase: the phase that runs now, for whoever must say where something happened.
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
    phase: str = "load"
    steps_run: int = 0
    last_loss: float | None = None

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
        # set_to_none: gradients kept as zeros would live through the next forward (docs/measuring.md 4).
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", mark)
        self.steps_run += 1
        self.last_loss = float(loss)
        return self.last_loss

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


def broken_loss(loss: float | None) -> str | None:
    """A sentence about a loss that is no number any more; None where it is one, or none was taken."""
    if loss is None or math.isfinite(loss):
        return None
    return f"the loss is {loss}: weights, inputs or labels are not finite, or overflow in this precision"


class OwnStep(Step):
    """A step of a model that may give its loss in any form."""

    def loss_of(self, samples: dict[str, Tensor]) -> Tensor:
        """Raises UserError: the model does not take the batch, gives no loss, or not one number."""
        where = type(self.model).__name__
        try:
            output = self.model(**samples, **self.constants)
        except TypeError as error:
            given = ", ".join([*samples, *self.constants])
            raise UserError(where, f"does not take the batch ({given}): {one_line(error)}", "mend the batch") from error
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
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "loss", None)


def build_step(cell: Cell, device: torch.device, padding: float = 0.0) -> Step:
    """The step of a cell: everything from its seed, model and method built on the CPU, then moved to `device`.

    padding: share of each sequence that is padding.
    Raises UserError: the model cannot be loaded, the method does not fit it.
    """
    model = built_model(cell)
    applied = with_method(cell, model)
    applied.model.to(device)
    batch, more = batch_of(cell, model, cell.batch_size, device, padding)
    return step_on(cell, applied, batch, device, kind=OwnStep if is_own(cell) else Step, **more)


def built_model(cell: Cell, name: str | None = None, *, num_labels: int | None = None) -> nn.Module:
    """The pre-trained model of a cell, in its precision, from its seed, on the CPU (or the default device).

    name: of the model to build in place of the cell's, such as the same one without its weights.
    Raises UserError as `build_model` does.
    """
    model = build_model(
        name or cell.model,
        cell.model_config_overrides,
        attention=cell.attention_requested,
        dtype=torch.float32 if cell.precision in AUTOCAST else DTYPES[cell.precision],
        seed=cell.seed,
        num_labels=num_labels,
        head=cell.head,
    )
    part = transformers_part(model)
    if part is not None:
        part.config.use_cache = False  # a training step reads no cache, and a decoder would fill one
    return model


def with_method(cell: Cell, model: nn.Module) -> Applied:
    """`model`, of `built_model`, under the cell's method and levers; new weights are drawn from the cell's seed.

    Raises UserError: the method does not fit the model.
    """
    if cell.precision == "nf4":
        part = transformers_part(model)
        if part is None:
            raise UserError(cell.model, "only a transformers model is held in 4 bits", "take another precision")
        quantize(part)
    method = "+".join([cell.method, *cell.levers.names()])
    return prepare(model, method, cell.method_params, seed=cell.seed)


def step_on(
    cell: Cell,
    applied: Applied,
    batch: dict[str, Tensor],
    device: torch.device,
    *,
    kind: type[Step] = Step,
    foreach: bool | None = None,
    scaled: bool = True,
    **more: Any,
) -> Step:
    """The cell's step of a model that has the method applied, on a resident batch.

    kind: the class of the step, `more`: what it takes besides.  foreach: as of `build_optimizer`.
    scaled: whether a loss under fp16 autocast is scaled; a scaler looks at values.
    """
    autocast = AUTOCAST.get(cell.precision)
    return kind(
        applied=applied,
        optimizer=build_optimizer(cell, list(applied.trained().values()), foreach),
        batch=batch,
        micro_batch_size=cell.micro_batch_size,
        device=device,
        sequence_length=cell.sequence_length,
        autocast=autocast,
        scaler=torch.amp.GradScaler(device.type) if scaled and autocast == torch.float16 else None,
        **more,
    )


def is_own(cell: Cell) -> bool:
    """Whether the cell's model or its batch is a function's of the user's own."""
    return cell.batch is not None or is_factory(cell.model)


def attention_used(cell: Cell, operators: Iterable[str]) -> str:
    """What a record says of a cell's attention. operators: the fused ones that ran; without any, plain products did.

    sdpa takes the fused operator it can, and falls to plain products (math) without a word.
    """
    fused = ", ".join(sorted(operators))
    if cell.attention_requested == OWN_ATTENTION:
        return f"sdpa: {fused}" if fused else "no fused kernel"
    return f"sdpa: {fused or 'math'}" if cell.attention_requested == "sdpa" else cell.attention_requested


def batch_of(
    cell: Cell, model: nn.Module, batch_size: int, device: torch.device, padding: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The resident batch of a cell's `model`, of `batch_size` samples; and of an OwnStep its `constants`.

    Raises UserError: the cell's own batch is none, or its model is of one's own and nobody says what it takes.
    """
    if cell.batch is not None:
        dtype = None if cell.precision in AUTOCAST else DTYPES[cell.precision]
        samples, constants = own_batch(
            cell.batch, batch_size, cell.sequence_length, device, dtype=dtype, seed=cell.seed
        )
        return samples, {"constants": constants}
    if is_factory(cell.model) and head_of_own(model) in (None, "multiple_choice"):
        what = f"what {type(model).__name__} takes is not known"
        raise UserError(cell.model, what, "name a function that makes a batch: `batch: my_package.models:batch`")
    batch = resident_batch(
        model,
        batch_size,
        cell.sequence_length,
        device,
        text_from=tokenizer_of(cell.model),
        padding=padding,
        seed=cell.seed,
    )
    return batch, {}


def build_optimizer(cell: Cell, parameters: list[nn.Parameter], foreach: bool | None = None) -> torch.optim.Optimizer:
    """The cell's optimizer; the learning rate is small enough that random labels do not drive weights away.

    foreach: the implementation where the cell names none; None: torch chooses by the device.
    """
    options = OPTIMIZER_IMPLEMENTATIONS[cell.optimizer_impl] if cell.optimizer_impl else {"foreach": foreach}
    if cell.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4, **options)
    return torch.optim.AdamW(parameters, lr=1e-4, **options)
