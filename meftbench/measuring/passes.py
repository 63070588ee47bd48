"""The passes of a cell on a device, each in its own window: memory, throughput, reconstruction (docs/design.md 6)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from meftbench.backbones.build import revision_of, tokenizer_of
from meftbench.catalogue import resolve
from meftbench.catalogue.probes import PROBES
from meftbench.errors import UserError
from meftbench.measuring.build import attention_used, build_step, is_own
from meftbench.measuring.out_of_memory import out_of_memory_as_result
from meftbench.measuring.sharing import Rank
from meftbench.measuring.step import Step
from meftbench.own_code import blamed, digests_of
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of
from meftbench.plan.protocol import Protocol
from meftbench.probes.counted_metrics import parameter_counts
from meftbench.probes.levers import check_levers
from meftbench.probes.memory_counted import CountedStep
from meftbench.probes.nvml import DeviceReading
from meftbench.probes.subject import Subject
from meftbench.records.record import Metric

if TYPE_CHECKING:
    from meftbench.tasks.fine_tuning import FineTuning


# The reference run of the reconstruction pass is one of whole weights, and of gradients that no other rank changes.
_NOT_OF_A_RANK = Metric(None, "measured", absent="is checked in one process: leave world_size and parallelism out")


@dataclass
class Measured:
    """The result of measuring a cell. observed: fields of the record's `cell` that are known only once it has run."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)


def run_passes(
    cell: Cell, protocol: Protocol, device: torch.device, reading: DeviceReading | None, rank: Rank | None = None
) -> Measured:
    """Build the cell on `device` and run the protocol's passes; if it has a training, it is then trained and scored.

    reading: what the driver reports of the device; None: nothing.  rank: which process of a distributed cell this is.
    Raises CellFailure (oom, error: lever-not-engaged) and UserError (what cannot be built).
    """
    if not is_own(cell):
        return _run(cell, protocol, device, reading, rank)
    # An exception from the user's own functions becomes an error that names them.
    with blamed([name for name, _ in calls_of([cell])]):
        return _run(cell, protocol, device, reading, rank)


def _run(
    cell: Cell, protocol: Protocol, device: torch.device, reading: DeviceReading | None, rank: Rank | None
) -> Measured:
    torch.manual_seed(cell.seed + (0 if rank is None else rank.number))  # ranks drop other units out
    begin = time.perf_counter()
    with out_of_memory_as_result(lambda: "load"):
        fine_tuning = None if cell.training is None else _fine_tuning(cell, device)
        step = build_step(cell, device, protocol.padding, rank) if fine_tuning is None else fine_tuning.step()
    rebuild = fine_tuning.step if fine_tuning else partial(build_step, cell, device, protocol.padding, rank)
    measured = Measured({"build_s": Metric(time.perf_counter() - begin, "measured")}, _observed(cell, step))
    measured.metrics |= parameter_counts(step.model)
    begin = time.perf_counter()
    with out_of_memory_as_result(lambda: step.phase):
        subject = Subject(cell, protocol, step, reading)
        # Training with reference autograd recomputes nothing, so there is no reconstruction to check.
        reference = cell.training is not None and cell.training.ordinary
        for name, entry in PROBES.items():
            if name == "reconstruction" and rank is not None and name in protocol.passes:
                measured.metrics |= dict.fromkeys(("reconstruction_rel_max", "gradient_rel_max"), _NOT_OF_A_RANK)
            elif name in protocol.passes and not (reference and name == "reconstruction"):
                if name == "reconstruction":
                    subject = replace(subject, step=_with_finite_weights(step, rebuild))
                with step.applied.reference_autograd() if reference else nullcontext():
                    metrics = resolve(entry.home)(subject)
                if not entry.usual and (taken := sorted(metrics.keys() & measured.metrics.keys())):
                    raise UserError(f"pass {name}", f"gives {taken[0]}, which another has given", "name it otherwise")
                measured.metrics |= metrics
        step = _with_finite_weights(step, rebuild)
        if not step.steps_run and not any(not stack.arithmetic.exact for stack in step.applied.stacks):
            step.run()
        with CountedStep(step) as counted:
            measured.metrics |= check_levers(step, cell)
        if (widenings := step.applied.range_widenings) is not None:
            measured.metrics["range_widenings"] = Metric(widenings, "counted")
        measured.observed["attention_used"] = attention_used(cell, counted.counter.attention_kernels)
    measured.metrics["passes_s"] = Metric(time.perf_counter() - begin, "measured")
    if fine_tuning is not None:
        # The passes have changed these weights; training begins with weights of its own.
        del step, subject
        gc.collect()
        torch.manual_seed(cell.seed)
        with out_of_memory_as_result(lambda: "training"):
            scored, observed = fine_tuning.train()
        measured.metrics |= scored
        measured.observed |= observed | {"inputs": cell.training.task if cell.training else None}
    return measured


def _observed(cell: Cell, step: Step) -> dict[str, Any]:
    inputs = "own" if cell.batch else "text" if tokenizer_of(cell.model) else "random tokens"
    observed: dict[str, Any] = {"model_revision": revision_of(step.model), "inputs": inputs}
    if is_own(cell):
        observed["own_code"] = digests_of(name for name, _ in calls_of([cell]))
    return observed


def _with_finite_weights(step: Step, rebuild: Callable[[], Step]) -> Step:
    """The step, or a new one if its training steps have led to weights that are not finite: the published arithmetic
    of MEFT may do that, and the checks are to show what it does to finite weights."""
    if all(bool(torch.isfinite(parameter).all()) for parameter in step.applied.trained().values()):
        return step
    return rebuild()


def _fine_tuning(cell: Cell, device: torch.device) -> FineTuning:
    """Imported here, since only fine-tuning needs datasets, scikit-learn and Trainer."""
    from meftbench.tasks.fine_tuning import FineTuning

    return FineTuning(cell, device)
