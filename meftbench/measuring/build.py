"""From a cell to its training step: the model, its method and memory optimisations (levers), the batch, the optimizer.

All that run a cell use this: the measurers, fine-tuning runs on a task, and the traces of predictions. What differs
between them (device, data) is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.backbones.own import head_of_own, transformers_part
from meftbench.backbones.packed import read_packed_rows
from meftbench.backbones.quantize import quantize
from meftbench.errors import UserError
from meftbench.measuring.batch import own_batch, resident_batch
from meftbench.measuring.optimizers import build_optimizer, note_embeddings
from meftbench.measuring.packing import STARTS, PackedStep, packed, starts_of, without_padding
from meftbench.measuring.sharing import Rank, shared
from meftbench.measuring.step import OwnStep, Step
from meftbench.methods import Applied, prepare
from meftbench.methods.levers.base import BuildOptimizer
from meftbench.plan.cell import Cell
from meftbench.plan.factories import OWN_ATTENTION, is_factory

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}  # over float32 weights


def build_step(cell: Cell, device: torch.device, padding: float = 0.0, rank: Rank | None = None) -> Step:
    """The step of a cell: model and method are built on the CPU from the cell's seed, then moved to `device`.

    padding: share of each sequence that is padding.  rank: this process, in a distributed cell; the batch of all ranks
    is made from the seed, and this rank takes its part.
    Raises UserError: the model cannot be loaded, the method does not fit it, or it cannot be shared among ranks.
    """
    model = built_model(cell)
    applied = with_method(cell, model)
    applied.model.to(device)
    batch, extra = batch_of(cell, model, cell.batch_size * cell.world_size, device, padding)
    if rank is not None:
        batch = {name: rank.own(tensor) for name, tensor in batch.items()}
        extra["sharing"] = shared(cell.label, applied, rank, device)
    return step_on(cell, applied, batch, device, kind=kind_of_step(cell), **extra)


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
    if cell.packing:
        read_packed_rows(cell.label, model)
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
    return prepare(model, method, cell.method_params, seed=cell.seed, lever_settings=cell.lever_params)


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

    kind: the class of the step.  extra: further arguments of that class.  foreach: as of `build_optimizer`.
    scaled: whether a loss under fp16 autocast is scaled. A trace cannot do that: a scaler reads values. A method's own
        optimizer has no gradients that could underflow.
    """
    autocast = AUTOCAST.get(cell.precision)
    note_embeddings(applied.model)
    build: BuildOptimizer = partial(build_optimizer, cell, foreach=foreach)
    if applied.own_optimizer is not None:
        build = partial(applied.own_optimizer, seed=cell.seed)
    return kind(
        applied=applied,
        optimizer=applied.optimizer(build),
        batch=batch,
        micro_batch_size=cell.micro_batch_size,
        device=device,
        sequence_length=cell.sequence_length,
        autocast=autocast,
        scaler=torch.amp.GradScaler(device.type)
        if scaled and autocast == torch.float16 and applied.own_optimizer is None
        else None,
        **extra,
    )


def kind_of_step(cell: Cell) -> type[Step]:
    """The class of the cell's step."""
    return PackedStep if cell.packing else OwnStep if is_own(cell) else Step


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
    if cell.packing:
        return f"sdpa, packed: {fused or 'math'}"
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
    for an OwnStep, if the batch is the user's own; `lengths` for a PackedStep.

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
        torch.device("cpu") if cell.packing else device,
        text_from=tokenizer_of(cell.model) if text else None,
        padding=padding,
        seed=cell.seed,
    )
    return packed_batch(cell, without_padding(batch), device) if cell.packing else (batch, {})


def packed_batch(
    cell: Cell, rows: Sequence[Mapping[str, Any]], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The resident batch of a packed cell, and the further arguments of its step.

    rows: input_ids and labels of each sample, without padding.
    """
    batch, lengths = packed(rows)
    batch[STARTS] = starts_of(lengths, min(cell.micro_batch_size, len(lengths)))
    return {name: tensor.to(device) for name, tensor in batch.items()}, {"lengths": lengths}
