"""From a cell to its training step: the model, the method and levers on it, the batch, the optimizer.

Whoever runs a cell comes this way: the measurers, trainings on a task, and the traces of predictions. What differs
between them (device, data) is handed in.
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
