"""Memory and time of training steps of a model and a batch of one's own: `meftbench.measure`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn

from meftbench.backbones.patched import check_trainable
from meftbench.catalogue.metrics import METRICS
from meftbench.errors import UserError, is_out_of_memory, one_line
from meftbench.measuring.batch import sorted_out
from meftbench.measuring.step import OwnStep, broken_loss
from meftbench.methods import Applied, prepare
from meftbench.methods.all_or_nothing import all_or_nothing
from meftbench.probes.counted_metrics import count_memory, parameter_counts
from meftbench.probes.memory_cuda import TorchAllocator, measure_memory
from meftbench.probes.nvml import reading_of
from meftbench.probes.speed import time_steps
from meftbench.records.record import Metric
from meftbench.reversible.recompute import modes_as


class Measurement(dict[str, Metric]):
    """Metrics by name, as in a record: `measurement["activation_peak_bytes"].value`."""

    def to_frame(self) -> pd.DataFrame:
        """One row a metric that is a number: its value, unit, and how it was obtained."""
        rows = [
            (name, metric.value, METRICS[name].unit if name in METRICS else "", metric.source)
            for name, metric in self.items()
            if isinstance(metric.value, int | float)
        ]
        return pd.DataFrame(rows, columns=["metric", "value", "unit", "source"]).set_index("metric")


def measure(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    method: str | None = None,
    module: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    micro_batch_size: int | None = None,
    warmup: int = 1,
    steps: int = 3,
    time: bool = True,
    **settings: Any,
) -> Measurement:
    """Memory and time of training steps of your own model, on the device it is on: memory counted on CPU, measured on
    CUDA; time measured, in steps of its own.

    model: run in training mode, with gradients; the mode of each of its modules is afterwards what it was.
    batch: arguments of the model's forward by name, labels among them. Tensors of one first dimension are its samples,
        moved to the model's device; lists of numbers become tensors; anything else is passed on as it is.
        The model gives a loss: as `loss` of an object or a dict, first of a tuple, or by itself; one number.
    method: applied to the model first, with `settings` and `module` as in `apply_method`; "offload" included.
    optimizer: of the trained parameters; AdamW if None.
    The parameters are trained for warmup + steps steps, and as many again where `time`: measure a copy, or before
    training. A method stays applied, unless an error is raised: `meftbench.unload` takes it off.
    Where the loss is no number (NaN, infinity) a warning says so, and so does the metric `collapse`.

    Raises UserError: a model without parameters, trained ones or values (meta); a batch without samples, or that the
    model does not take; no loss, or one that is no single number; no steps; whatever a step raises, as its cause.

    >>> measure(model, batch)["activation_peak_bytes"].value  # doctest: +SKIP
    """
    _check_counts(warmup=(warmup, 0), steps=(steps, 1), micro_batch_size=(micro_batch_size, 1))
    if not isinstance(model, nn.Module):
        raise UserError("measure", f"the model is {type(model).__name__}, no torch module", "give a torch.nn.Module")
    if optimizer is not None and method is not None:
        raise UserError("measure", "the optimizer is older than the method's weights", "leave one of them out")
    if method is None and settings:
        raise UserError("measure", f"{min(settings)} is a setting of no method", "name the method, or leave it out")
    with all_or_nothing(model):
        applied = Applied(model) if method is None else prepare(model, method, settings, seed=0, module=module)
        return _measured(applied, batch, optimizer, micro_batch_size, warmup, steps, time)


def _measured(
    applied: Applied,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
    micro_batch_size: int | None,
    warmup: int,
    steps: int,
    time: bool,
) -> Measurement:
    device, trained = _checked(applied)
    samples, constants = sorted_out("measure", batch, device)
    step = OwnStep(
        applied=applied,
        optimizer=optimizer or torch.optim.AdamW(trained, lr=1e-5),
        batch=samples,
        micro_batch_size=micro_batch_size or len(next(iter(samples.values()))),
        device=device,
        constants=constants,
    )
    found = Measurement(parameter_counts(applied.model))
    with ExitStack() as entered:
        entered.enter_context(_said_in_a_line(type(applied.model).__name__))
        entered.enter_context(torch.inference_mode(False))
        entered.enter_context(torch.enable_grad())
        # Evaluation mode holds less: dropout does nothing, and transformers does not checkpoint.
        entered.enter_context(modes_as(applied.model, [True for _ in applied.model.modules()]))
        if device.type == "cuda":
            found |= measure_memory(step, warmup, steps, TorchAllocator(), reading_of(device))
        else:
            found |= count_memory(step, warmup, steps)
        if time:
            found |= time_steps(step, warmup, steps)
    if broken := broken_loss(step.last_loss):
        found["collapse"] = Metric(broken, "measured")
        warnings.warn(broken, UserWarning, stacklevel=3)
    if "attention_mask" not in samples:
        found.pop("tokens_per_s", None)  # how many there are is not known
    return found


@contextmanager
def _said_in_a_line(where: str) -> Iterator[None]:
    """What the user's model, or torch about their batch, raises: our line, and theirs as its cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = f"a training step of it fails ({type(error).__name__}: {one_line(error)})"
        raise UserError(where, what, "mend the model or the batch: the error above says where") from error


def _check_counts(**counts: tuple[int | None, int]) -> None:
    for name, (count, least) in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
            raise UserError("measure", f"{name} is {count!r}", f"write a whole number from {least}")


def _checked(applied: Applied) -> tuple[torch.device, list[nn.Parameter]]:
    """The model's device and trained parameters."""
    model, where = applied.model, type(applied.model).__name__
    parameters = list(model.parameters())
    if not parameters:
        raise UserError(where, "has no parameters", "give a model that can be trained")
    if any(parameter.is_meta for parameter in parameters):
        raise UserError(where, "its weights have no values (meta)", "load them: model.to_empty(device=...) and weights")
    check_trainable(model)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError(where, "all its parameters are frozen", "train some of them: requires_grad_(True), or a method")
    return trained[0].device, trained
