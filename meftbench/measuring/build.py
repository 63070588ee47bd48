"""From a cell to its training step: the model, its method and memory optimisations (levers), the batch, the optimizer.

All that run a cell use this: the measurers, fine-tuning runs on a task, and the traces of predictions. What differs
between them (device, data) is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.backbones.own import head_of_own, transformers_part
from meftbench.backbones.quantize import quantize
from meftbench.errors import UserError
from meftbench.measuring.batch import own_batch, resident_batch
from meftbench.measuring.step import OwnStep, Step
from meftbench.methods import Applied, prepare
from meftbench.plan.cell import Cell
from meftbench.plan.factories import OWN_ATTENTION, is_factory

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
# Arguments of torch's optimizers for a cell's `optimizer_impl`.
OPTIMIZER_IMPLEMENTATIONS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}  # over float32 weights


def build_step(cell: Cell, device: torch.device, padding: float = 0.0) -> Step:
    """The step of a cell: model and method are built on the CPU from the cell's seed, then moved to `device`.

    padding: share of each sequence that is padding.
    Raises UserError: the model cannot be loaded, the method does not fit it.
    """
    model = built_model(cell)
    applied = with_method(cell, model)
    applied.model.to(device)
    batch, extra = batch_of(cell, model, cell.batch_size, device, padding)
    return step_on(cell, applied, batch, device, kind=OwnStep if is_own(cell) else Step, **extra)


def built_model(cell: Cell, name: str | None = None, *, num_labels: int | None = None) -> nn.Module:
    """The pre-trained model of a cell, in its precision; new weights are drawn from its seed. It is on the CPU (or on
    torch's default device).

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
    """`model`, of `built_model`, with the cell's method and levers; new weights are drawn from the cell's seed.

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
    **extra: Any,
) -> Step:
    """The cell's step of a model that has the method applied, on a resident batch.

    kind: the class of the step.  extra: further arguments of that class.  foreach: as in `build_optimizer`.
    scaled: whether a loss under fp16 autocast is scaled. A trace cannot do that: a scaler reads values. A method's own
        optimizer has no gradients that could underflow.
    """
    autocast = AUTOCAST.get(cell.precision)
    trained, own = list(applied.trained().values()), applied.optimizer
    return kind(
        applied=applied,
        optimizer=build_optimizer(cell, trained, foreach) if own is None else own(trained, seed=cell.seed),
        batch=batch,
        micro_batch_size=cell.micro_batch_size,
        device=device,
        sequence_length=cell.sequence_length,
        autocast=autocast,
        scaler=torch.amp.GradScaler(device.type) if scaled and autocast == torch.float16 and own is None else None,
        **extra,
    )


def is_own(cell: Cell) -> bool:
    """Whether the cell's model or its batch comes from the user's own function."""
    return cell.batch is not None or is_factory(cell.model)


def attention_used(cell: Cell, operators: Iterable[str]) -> str:
    """What a record says of a cell's attention. operators: the fused ones that ran; none: it ran as plain products.

    sdpa chooses a fused operator where one applies, and otherwise takes plain products (math) without a warning.
    """
    fused = ", ".join(sorted(operators))
    if cell.attention_requested == OWN_ATTENTION:
        return f"sdpa: {fused}" if fused else "no fused kernel"
    return f"sdpa: {fused or 'math'}" if cell.attention_requested == "sdpa" else cell.attention_requested


def batch_of(
    cell: Cell,
    model: nn.Module,
    batch_size: int,
    device: torch.device,
    padding: float = 0.0,
    *,
    text: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The resident batch for a cell's `model`, of `batch_size` samples; and further arguments of its step: `constants`
    for an OwnStep, if the batch is the user's own.

    text: whether pre-trained weights get text, for which their tokenizer is loaded; a trace needs shapes alone.
    Raises UserError: the user's own batch is invalid, or the user's own model needs one and the cell has none.
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
        text_from=tokenizer_of(cell.model) if text else None,
        padding=padding,
        seed=cell.seed,
    )
    return batch, {}


def build_optimizer(cell: Cell, parameters: list[nn.Parameter], foreach: bool | None = None) -> torch.optim.Optimizer:
    """The cell's optimizer; the learning rate is so small that random labels do not move weights far.

    foreach: torch's argument where the cell names no implementation; None: torch chooses by the device.
    """
    options = OPTIMIZER_IMPLEMENTATIONS[cell.optimizer_impl] if cell.optimizer_impl else {"foreach": foreach}
    if cell.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4, **options)
    return torch.optim.AdamW(parameters, lr=1e-4, **options)
