"""Memory and time of training steps of the user's own model and batch: `meftbench.measure`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
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
        """One row for each metric that is a number: its value, its unit, and how it was obtained."""
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
    """Memory and time of training steps of your own model, on the device it is on. Memory is counted on CPU and
    measured on CUDA; time is measured, in separate steps.

    model: is run in training mode with gradients; afterwards each of its modules is in the mode it was in before.
    batch: arguments of the model's forward by name, labels among them. The first dimension of tensors is that of the
        samples; they are moved to the model's device. Lists of numbers become tensors; anything else is passed as it
        is. The model must return the loss, a single number: as `loss` of an object or a dict, as the first item of a
        tuple, or alone.
    method: is applied to the model first, with `settings` and `module` as in `apply_method`, but with any lever.
    optimizer: of the trained parameters; None: AdamW, or the method's own.
    The parameters are trained for warmup + steps steps, and for as many again if `time`: so measure a copy of the
    model, or measure before training. A method stays applied, unless an error is raised; `meftbench.unload` removes it.
    Where the loss is NaN or infinite, a warning says so, and so does the metric `collapse`.

    Raises UserError: the model has no parameters, none that are trained, or weights without values (meta); the batch
    has no samples, or the model does not take it; there is no loss, or it is not a single number; there are no steps.
    An error that a step raises is the cause of a UserError; running out of memory is raised as it is.

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
    device = _device_of_trained(applied)
    samples, constants = sorted_out("measure", batch, device)
    step = OwnStep(
        applied=applied,
        optimizer=optimizer or applied.optimizer(applied.own_optimizer or partial(torch.optim.AdamW, lr=1e-5)),
        batch=samples,
        micro_batch_size=micro_batch_size or len(next(iter(samples.values()))),
        device=device,
        constants=constants,
    )
    measurement = Measurement(parameter_counts(applied.model))
    with ExitStack() as contexts:
        contexts.enter_context(_errors_in_one_line(type(applied.model).__name__))
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())
        # Evaluation mode would take other memory: dropout does nothing, and transformers does not checkpoint.
        contexts.enter_context(modes_as(applied.model, [True for _ in applied.model.modules()]))
        if device.type == "cuda":
            measurement |= measure_memory(step, warmup, steps, TorchAllocator(), reading_of(device))
        else:
            measurement |= count_memory(step, warmup, steps)
        if time:
            measurement |= time_steps(step, warmup, steps)
    if broken := broken_loss(step.last_loss):
        measurement["collapse"] = Metric(broken, "measured")
        warnings.warn(broken, UserWarning, stacklevel=3)
    if "attention_mask" not in samples:
        measurement.pop("tokens_per_s", None)  # without a mask the number of tokens is not known
    return measurement


@contextmanager
def _errors_in_one_line(where: str) -> Iterator[None]:
    """Turn an error in a step of the user's model into a UserError of one line, with the error as its cause. Running
    out of memory, and a UserError, are raised unchanged."""
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


def _device_of_trained(applied: Applied) -> torch.device:
    """The device of the model's trained parameters. Raises UserError where it cannot be trained."""
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
    return trained[0].device
