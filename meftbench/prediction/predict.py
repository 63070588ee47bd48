"""Memory of a cell on a GPU that is not present: its step is traced by CUDA's rules, and the allocations replayed."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from meftbench.catalogue.operations import Work
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.catalogue.profiles import Profile, find_profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import AUTOCAST, attention_used, is_own
from meftbench.measuring.step import PHASES
from meftbench.methods import Applied
from meftbench.own_code import digests_of
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of
from meftbench.plan.models import image_tokens, known_config
from meftbench.plan.protocol import Protocol
from meftbench.prediction.allocator import AllocatorSettings, Event, Replayed, StepLevels, replay
from meftbench.prediction.cuda_counter import PredictedStep
from meftbench.prediction.older_rules import older_rules
from meftbench.prediction.overlay import cuda_semantics
from meftbench.prediction.partitioned import partitioned_instead_of_compiled
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.repeated import step_after, tell
from meftbench.prediction.trace import blamed_step, named_refusals, uncomputed_step
from meftbench.probes.counted_metrics import paged_metrics, parameter_counts, step_metrics
from meftbench.probes.memory_counted import Observed
from meftbench.records.record import Metric
from meftbench.units import format_bytes


@dataclass
class Predicted:
    """The result of predicting a cell.

    warm, measured: the warm-up steps and those after them, as counted; sizes are rounded up to blocks of 512 bytes.
    events: of all these steps, for the allocator's replay.  starts: numbers of the events with which they begin.
    replayed: the allocator's statistics after them.  sizes: numbers of parameters.  seconds: that the prediction took.
    attention: fused attention operators that ran.  work: what the last traced step does, as a later one does it.
    tokens: of a batch.
    """

    profile: Profile
    warm: list[Observed]
    measured: list[Observed]
    events: list[Event]
    starts: list[int]
    replayed: Replayed
    sizes: dict[str, Metric]
    seconds: float
    attention: set[str] = field(default_factory=set)
    work: Work = field(default_factory=Work)
    tokens: int = 0

    @property
    def step_from(self) -> int:
        """Number of the first event of the last step."""
        return self.starts[-1]

    @property
    def peak(self) -> int:
        """Peak allocated, bytes: what torch.cuda.max_memory_allocated would report. Where the device's memory does not
        suffice, what the step would need beside it is counted in blocks of 512 bytes."""
        counted = max(observed.peak.total for observed in [*self.warm, *self.measured])
        return self.replayed.allocated_peak if self.replayed.oom is None else max(counted, self.replayed.allocated_peak)

    @property
    def process(self) -> int:
        """What the driver would show for the process, bytes: reserved memory and the CUDA context."""
        return self.replayed.reserved_peak + self.profile.context_bytes

    def metrics(self, first: int | None = None, last: int | None = None) -> dict[str, Metric]:
        """The memory metrics of a record (docs/measuring.md 2), source predicted, over the steps `first` to `last`;
        None: over those after the warm-up."""
        chosen = slice(len(self.warm) if first is None else first, None if last is None else last + 1)
        counted = [*self.warm, *self.measured][chosen]
        replayed = self.replayed
        metrics = step_metrics(self.warm if first is None else [], counted, "predicted")
        return (
            self.sizes
            | metrics
            | _block_metrics(replayed.steps[chosen], replayed.steps[0], metrics)
            | {
                "fragmentation_ratio": Metric(replayed.fragmentation, "predicted"),
                "device_allocs": Metric(replayed.device_allocs, "predicted"),
                "alloc_retries": Metric(replayed.retries, "predicted"),
                "context_bytes": Metric(self.profile.context_bytes, "predicted"),
                "process_device_bytes": Metric(self.process, "predicted"),
                "passes_s": Metric(self.seconds, "measured"),
            }
        )


def _block_metrics(steps: list[StepLevels], first: StepLevels, counted: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics in which torch counts whole blocks, a rest that is not split off included: those of the replay.

    counted: metrics of the same steps without such rests, which are added to `other_bytes`.
    """

    def over_steps(values: list[int]) -> Metric:
        return Metric(max(values), "predicted", n=len(values), min=min(values), max=max(values))

    def over_phases(name: str) -> Metric:
        whole = over_steps([getattr(step.peak, name) for step in steps])
        phases = {phase: max(getattr(step.phases[phase], name) for step in steps) for phase in PHASES}
        return replace(whole, phases={**phases, "step": max(getattr(step.peak, name) for step in steps)})

    peak = max(step.peak.allocated for step in steps)
    other, counted_peak = counted["other_bytes"].value, counted["peak_allocated_bytes"].value
    assert isinstance(other, int)
    assert isinstance(counted_peak, int)
    worst = max(steps, key=lambda step: step.peak.allocated)
    return {
        "peak_allocated_bytes": over_phases("allocated"),
        "peak_active_bytes": over_phases("allocated"),
        "peak_requested_bytes": over_phases("requested"),
        "peak_reserved_bytes": over_phases("reserved"),
        "baseline_allocated_bytes": over_steps([step.baseline.allocated for step in steps]),
        "activation_peak_bytes": over_steps([step.activation_peak for step in steps]),
        "optimizer_peak_bytes": over_steps([step.phases["optimizer"].allocated for step in steps]),
        "first_step_peak_allocated_bytes": Metric(first.peak.allocated, "predicted"),
        "peak_phase": Metric(max(PHASES, key=lambda phase: worst.phases[phase].allocated), "predicted"),
        "other_bytes": Metric(other + peak - counted_peak, "predicted"),
    }


def predict(
    cell: Cell,
    profile: Profile,
    *,
    warmup: int = 1,
    steps: int = 1,
    settings: AllocatorSettings | None = None,
    settle: bool = False,
    remembered: Remembered | None = None,
    applied: Applied | None = None,
    versions: Versions = NOW,
    padding: float = 0.0,
) -> Predicted:
    """The memory of `cell` on the device of `profile`. The first step is traced; later ones are derived from it, unless
    the optimizer replaces its state in each: then each is traced.

    settings: of the allocator; None: torch's defaults, within the device's memory.  settle: whether cached memory is
    given back after the warm-up, as it is when a cell is measured.  remembered: results of operators on meta tensors in
    other traces.  applied: of `trace.uncomputed_model`; unless the cell's precision is autocast, it may have been
    traced in another shape before. None: it is built.  versions: of torch and transformers, whose rules are taken.
    padding: of a packed cell, the share of each sequence that is left out; others have none.
    Raises UserError: the cell cannot be built, or a trace cannot follow it.
    """
    begin = time.perf_counter()
    on_meta = cell.precision not in AUTOCAST
    step, mode = uncomputed_step(
        cell, foreach=versions.foreach_optimizer, on_meta=on_meta, applied=applied, padding=padding
    )
    with ExitStack() as traced:
        for region in (blamed_step(cell), named_refusals(cell), cuda_semantics(profile, versions)):
            traced.enter_context(region)
        traced.enter_context(older_rules(versions, step))
        traced.enter_context(partitioned_instead_of_compiled(step.applied))
        traced.enter_context(mode)
        counted = traced.enter_context(PredictedStep(step, remembered or Remembered(), profile, versions))
        assert counted.counter.events is not None
        traced.enter_context(counted.counter.work.entered())
        before = len(counted.counter.events)
        starts, observed = [], []
        for _ in range(warmup + steps if OPTIMIZERS[cell.optimizer].replaces_state else 1):
            starts.append(_allocations(counted.counter.events))
            observed.append(counted.run())
            gc.collect()  # what the step leaves alive after this stays alive
    work = counted.counter.work.work
    for lever, made in step.applied.levers.items():
        if fact := made.missing_in_trace(counted.counter.attention_kernels):
            raise UserError(cell.label, f"{lever}: {fact} on {profile.device}", f"change the settings of {lever}")
    events = [Event(*event) for event in counted.counter.events]
    counted.counter.events = None
    all_events = [event for event in events if event.kind != "book"]
    if len(observed) < warmup + steps:
        later_events = step_after(events[before:])
        later = counted.observe(lambda mark: tell(later_events, counted.counter, mark))
        later.host_peak = observed[0].host_peak
    while len(observed) < warmup + steps:
        observed.append(later)
        starts.append(len(all_events))
        all_events += [event for event in later_events if event.kind != "book"]
    settings = settings or AllocatorSettings(capacity=profile.memory_bytes - profile.context_bytes)
    return Predicted(
        profile,
        observed[:warmup],
        observed[warmup:],
        all_events,
        starts,
        replay(all_events, settings, starts, starts[warmup] if settle and warmup < len(starts) else -1),
        parameter_counts(step.model) | paged_metrics(step, "predicted"),
        time.perf_counter() - begin,
        set(counted.counter.attention_kernels),
        work,
        cell.batch_size * step.sequence_length,
    )


def _allocations(events: list[tuple[str, int, int, str, str]]) -> int:
    """How many events are not only changes of a category, which the allocator does not see."""
    return sum(event[0] != "book" for event in events)


def predicted_cell(cell: Cell, protocol: Protocol) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Metrics and observations of a cell whose device is `predicted:PROFILE`.

    The replay uses the protocol's allocator settings and memory limit.
    Raises CellFailure (oom) where the device's memory does not suffice, UserError as `predict` does, and where
    sequences are to be padded: a trace has no attention mask, and with a mask other attention kernels would run. A
    packed cell leaves the padding out, and is predicted.
    """
    profile = find_profile(cell.device.partition(":")[2])
    padded = protocol.padding and not cell.packing
    if padded and not image_tokens(known_config(cell.model, cell.model_config_overrides) or {}):
        what = f"padding ({protocol.padding:g} of each sequence) cannot be predicted"
        raise UserError(cell.label, what, "set `padding: 0` in the protocol, measure it, or take packing: true")
    if cell.packing and cell.training is not None:
        what = "rows of a task that are packed are as long as its texts, which a prediction does not read"
        raise UserError(
            cell.label, what, "predict it with packing: false, as the most that it takes, or without a task"
        )
    capacity = profile.memory_bytes - profile.context_bytes
    if protocol.memory_limit is not None:
        capacity = min(capacity, protocol.memory_limit)
    settings = replace(AllocatorSettings.parse(protocol.alloc_conf), capacity=capacity)
    predicted = predict(
        cell,
        profile,
        warmup=max(1, protocol.warmup),
        steps=max(1, protocol.steps),
        settings=settings,
        settle=True,
        padding=protocol.padding,
    )
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
