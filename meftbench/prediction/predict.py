"""Memory of a cell on a GPU that is not present: its step is traced by CUDA's rules, and the allocations replayed."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from meftbench.catalogue.profiles import Profile, find_profile
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import AUTOCAST, attention_used, is_own
from meftbench.measuring.step import Step
from meftbench.methods import Applied
from meftbench.own_code import digests_of
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of
from meftbench.plan.models import image_tokens, known_config
from meftbench.plan.protocol import Protocol
from meftbench.prediction.allocator import AllocatorSettings, Event, Replayed, replay
from meftbench.prediction.overlay import cuda_semantics, scratch_bytes
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.repeated import step_after, tell
from meftbench.prediction.trace import blamed_step, named_refusals, uncomputed_step
from meftbench.probes.counted_metrics import parameter_counts, step_metrics
from meftbench.probes.memory_counted import CountedStep, Observed, StorageCounter
from meftbench.records.record import Metric
from meftbench.units import format_bytes


@dataclass
class Predicted:
    """The result of predicting a cell.

    warm, measured: the warm-up steps and those after them; sizes are rounded up to blocks of 512 bytes.
    events: of all these steps, for the allocator's replay.  replayed: the allocator's statistics after them.
    sizes: numbers of parameters.  workspace: bytes that cuBLAS keeps.  step_from: index of the first event of the
    last step.  seconds: that the prediction took.  attention: fused attention operators that ran.
    """

    profile: Profile
    warm: list[Observed]
    measured: list[Observed]
    events: list[Event]
    replayed: Replayed
    sizes: dict[str, Metric]
    workspace: int
    step_from: int
    seconds: float
    attention: set[str] = field(default_factory=set)

    @property
    def peak(self) -> int:
        """Peak allocated, bytes: what torch.cuda.max_memory_allocated would report."""
        return max(observed.peak.total for observed in [*self.warm, *self.measured])

    @property
    def process(self) -> int:
        """What the driver would show for the process, bytes: reserved memory and the CUDA context."""
        return self.replayed.reserved_peak + self.profile.context_bytes

    def metrics(self) -> dict[str, Metric]:
        """The memory metrics of a record (docs/measuring.md 2), source predicted."""
        metrics = step_metrics(self.warm, self.measured, "predicted")
        other_bytes = metrics["other_bytes"].value
        assert isinstance(other_bytes, int)
        replayed = self.replayed
        return (
            self.sizes
            | metrics
            | {
                "other_bytes": Metric(other_bytes - self.workspace, "predicted"),
                "workspace_bytes": Metric(self.workspace, "predicted"),
                "peak_requested_bytes": Metric(replayed.requested_peak, "predicted"),
                "peak_active_bytes": Metric(replayed.active_peak, "predicted"),
                "peak_reserved_bytes": Metric(replayed.reserved_peak, "predicted"),
                "fragmentation_ratio": Metric(replayed.fragmentation, "predicted"),
                "device_allocs": Metric(replayed.device_allocs, "predicted"),
                "alloc_retries": Metric(replayed.retries, "predicted"),
                "context_bytes": Metric(self.profile.context_bytes, "predicted"),
                "process_device_bytes": Metric(self.process, "predicted"),
                "passes_s": Metric(self.seconds, "measured"),
            }
        )


class CudaCounter(StorageCounter):
    """A storage counter that also counts the scratch memory of CUDA kernels, and keeps a list of its events."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and skipping the compiler takes longer than counting

    def __init__(self, device_type: str, remembered: Remembered) -> None:
        super().__init__(device_type)
        self.events = []
        self._call = remembered

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sizes = scratch_bytes(func.__name__, args)
        scratch = [torch.empty(nbytes, dtype=torch.uint8, device=self.device_type) for nbytes in sizes]
        self._op = func.__name__
        for tensor in scratch:
            self._see(tensor, "temporaries")
        result = self._call(func, args, kwargs)
        self.returned(func.__name__, result)
        return result

    def _see(self, tensor: Tensor, category: str) -> None:
        if self.phase == "optimizer" and tensor.dim() == 0:
            return  # optimizers keep their step count, a scalar, on the host
        super()._see(tensor, category)


class PredictedStep(CountedStep):
    """A step under a counter of what it would allocate on a CUDA device."""

    def __init__(self, step: Step, remembered: Remembered) -> None:
        super().__init__(step)
        self.counter = CudaCounter(step.device.type, remembered)


def predict(
    cell: Cell,
    profile: Profile,
    *,
    warmup: int = 1,
    steps: int = 1,
    settings: AllocatorSettings | None = None,
    remembered: Remembered | None = None,
    applied: Applied | None = None,
) -> Predicted:
    """The memory of `cell` on the device of `profile`. The first step is traced; later ones are derived from it.

    settings: of the allocator; None: torch's defaults, within the device's memory.  remembered: results of operators on
    meta tensors in other traces.  applied: of `trace.uncomputed_model`; unless the cell's precision is autocast, it may
    have been traced in another shape before. None: it is built.
    Raises UserError: the cell cannot be built, or a trace cannot follow it.
    """
    begin = time.perf_counter()
    on_meta = cell.precision not in AUTOCAST
    step, mode = uncomputed_step(cell, foreach=True, on_meta=on_meta, applied=applied)
    with blamed_step(cell), named_refusals(cell), cuda_semantics(profile), mode:
        workspace = torch.empty(profile.cublas_workspace_bytes, dtype=torch.uint8, device=step.device)
        with PredictedStep(step, remembered or Remembered()) as counted:
            counted.counter.book(workspace, "other")
            assert counted.counter.events is not None
            step_from = len(counted.counter.events)
            first = counted.run()
            gc.collect()  # what the step leaves alive after this stays alive
    events = [Event(*event) for event in counted.counter.events]
    counted.counter.events = None
    later_events = step_after(events[step_from:])
    later = counted.observe(lambda mark: tell(later_events, counted.counter, mark))
    later.host_peak = first.host_peak
    observed = [first, *[later] * (warmup + steps - 1)]
    replayed_events = [event for event in events if event.kind != "book"]
    for _ in range(warmup + steps - 1):
        step_from = len(replayed_events)
        replayed_events += [event for event in later_events if event.kind != "book"]
    settings = settings or AllocatorSettings(capacity=profile.memory_bytes - profile.context_bytes)
    return Predicted(
        profile,
        observed[:warmup],
        observed[warmup:],
        replayed_events,
        replay(replayed_events, settings),
        parameter_counts(step.model),
        workspace.nbytes,
        step_from,
        time.perf_counter() - begin,
        set(counted.counter.attention_kernels),
    )


def predicted_cell(cell: Cell, protocol: Protocol) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Metrics and observations of a cell whose device is `predicted:PROFILE`.

    The replay uses the protocol's allocator settings and memory limit.
    Raises CellFailure (oom) where the device's memory does not suffice, UserError as `predict` does, and where
    sequences are to be padded: a trace has no attention mask, and with a mask other attention kernels would run.
    """
    profile = find_profile(cell.device.partition(":")[2])
    if protocol.padding and not image_tokens(known_config(cell.model, cell.model_config_overrides) or {}):
        what = f"padding ({protocol.padding:g} of each sequence) cannot be predicted"
        raise UserError(cell.label, what, "set `padding: 0` in the protocol, or measure it")
    capacity = profile.memory_bytes - profile.context_bytes
    if protocol.memory_limit is not None:
        capacity = min(capacity, protocol.memory_limit)
    settings = replace(AllocatorSettings.parse(protocol.alloc_conf), capacity=capacity)
    predicted = predict(cell, profile, warmup=max(1, protocol.warmup), steps=max(1, protocol.steps), settings=settings)
    if (failed := predicted.replayed.oom) is not None:
        raise CellFailure(
            "oom",
            type="predicted",
            message=f"{format_bytes(failed.nbytes)} more than {profile.device} has left",
            requested_bytes=failed.nbytes,
            capacity_bytes=capacity,
            peak_allocated_bytes=predicted.peak,
        )
    used = attention_used(cell, predicted.attention)
    observed: dict[str, Any] = {"attention_used": used, "inputs": "shapes", "model_revision": None}
    if is_own(cell):
        observed["own_code"] = digests_of(name for name, _ in calls_of([cell]))
    return predicted.metrics(), observed
