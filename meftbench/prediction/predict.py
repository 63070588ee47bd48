"""Memory of a cell on a GPU that is not present: its step is traced by CUDA's rules, and the allocations replayed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meftbench.catalogue.operations import Work
from meftbench.catalogue.parallelisms import PARALLELISMS
from meftbench.catalogue.profiles import Profile, find_profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import attention_used, is_own
from meftbench.measuring.step import PHASES
from meftbench.own_code import digests_of
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of
from meftbench.plan.models import image_tokens, known_config
from meftbench.plan.protocol import Protocol
from meftbench.prediction.allocator import (
    AllocatorSettings,
    Asked,
    Event,
    Replayed,
    StepLevels,
    replay_asked,
)
from meftbench.prediction.columns import Trace, joined
from meftbench.prediction.loops import expanded
from meftbench.prediction.repeated import step_after, told_steps
from meftbench.prediction.tracer import Traced, Tracer
from meftbench.probes.counted_metrics import step_metrics
from meftbench.probes.memory_counted import Observed
from meftbench.records.record import Metric
from meftbench.units import format_bytes


@dataclass
class _Steps:
    """Steps by their events. told: the steps that differ, and one step that all later ones are like.  told_starts: the
    numbers of the events with which those begin.  steps: how many there are."""

    told: Trace
    told_starts: list[int]
    steps: int

    @classmethod
    def of(cls, trace: Trace, steps: int) -> _Steps:
        """`steps` steps: those of the trace, and later ones that follow from its first, or are like its last where it
        has several."""
        told, starts = trace.without_starts()
        if len(starts) == 1 < steps:
            later = step_after(told.chosen(slice(starts[0], None)))
            starts.append(len(told))
            told = joined([told, later])
        return cls(told, starts, max(steps, len(starts)))

    @cached_property
    def seen(self) -> Trace:
        """What the allocator sees of all steps: no changes of a category, and nothing in host memory."""
        last = self.told.chosen(slice(self.told_starts[-1], None))
        whole = joined([self.told, *[last] * (self.steps - len(self.told_starts))])
        return whole.chosen(self._seen_of(whole))

    @cached_property
    def starts(self) -> list[int]:
        """The numbers of the events of `seen` with which steps begin."""
        before = np.append(0, np.cumsum(self._seen_of(self.told)))
        starts: list[int] = before[self.told_starts].tolist()
        of_last = int(before[-1]) - starts[-1]
        return starts + [starts[-1] + times * of_last for times in range(1, self.steps - len(starts) + 1)]

    def _seen_of(self, trace: Trace) -> NDArray[np.bool_]:
        on_host = np.unique(trace.storage[trace.is_of("host")])
        return ~trace.is_kind("book") & ((trace.storage < 0) | ~np.isin(trace.storage, on_host))

    @cached_property
    def asked(self) -> Asked:
        return self.seen.asked()

    def replayed(self, settings: AllocatorSettings, settled: int | None) -> Replayed:
        """settled: the number of the step before which cached memory is given back; None: it is not."""
        settles = settled is not None and settled < self.steps
        return replay_asked(self.asked, settings, self.starts, self.starts[settled or 0] if settles else -1)

    def observed(self) -> list[Observed]:
        observed = told_steps(self.told.events(), self.told_starts)
        return observed + [observed[-1]] * (self.steps - len(observed))


@dataclass
class Predicted:
    """The result of predicting a cell.

    traced: from which all follows.  settings, warmup, steps, settle: as of `predict`.
    seconds: that the prediction took until now.  tokens: of a step.  work_of: gives what a step does.
    """

    profile: Profile
    traced: Traced
    settings: AllocatorSettings
    warmup: int = 1
    steps: int = 1
    settle: bool = False
    seconds: float = 0.0
    tokens: int = 0
    work_of: Callable[[], Work] = Work

    @cached_property
    def replayed(self) -> Replayed:
        """The allocator's statistics after all steps."""
        begin = time.perf_counter()
        replayed = self.replayed_in(self.settings, self.settle)
        self.seconds += time.perf_counter() - begin
        return replayed

    @cached_property
    def _shortened(self) -> _Steps:
        """The steps without the rounds of loops that change nothing."""
        return _Steps.of(self.traced.trace, self.warmup + self.steps)

    @cached_property
    def _whole(self) -> _Steps:
        trace = expanded(self.traced.trace)
        return self._shortened if trace is self.traced.trace else _Steps.of(trace, self.warmup + self.steps)

    @cached_property
    def events(self) -> list[Event]:
        """Of all steps, what the allocator sees."""
        return self._whole.seen.events()

    @property
    def starts(self) -> list[int]:
        """Numbers of the events with which the steps begin."""
        return self._whole.starts

    @property
    def sizes(self) -> dict[str, Metric]:
        """Numbers of parameters."""
        return self.traced.sizes

    @property
    def attention(self) -> set[str]:
        """Fused attention operators that ran."""
        return set(self.traced.attention)

    def replayed_in(self, settings: AllocatorSettings, settle: bool = False) -> Replayed:
        """The allocator's statistics with other settings, such as another capacity. settle: as of `predict`."""
        if not settings.garbage_collection_threshold:  # it goes by how often the allocator was asked
            return self._shortened.replayed(settings, self.warmup if settle else None)
        return self._whole.replayed(settings, self.warmup if settle else None)

    @cached_property
    def work(self) -> Work:
        """What the last step does, as every later one does it."""
        return self.work_of()

    @cached_property
    def observed(self) -> list[Observed]:
        """What a counter would have seen in each step; sizes are rounded up to blocks of 512 bytes."""
        return self._whole.observed()

    @property
    def warm(self) -> list[Observed]:
        return self.observed[: self.warmup]

    @property
    def measured(self) -> list[Observed]:
        return self.observed[self.warmup :]

    @property
    def step_from(self) -> int:
        """Number of the first event of the last step."""
        return self.starts[-1]

    @property
    def peak(self) -> int:
        """Peak allocated, bytes: what torch.cuda.max_memory_allocated would report. Where the device's memory does not
        suffice, what the step would need beside it is counted in blocks of 512 bytes."""
        if self.replayed.oom is None:
            return self.replayed.allocated_peak
        return max(self.replayed.allocated_peak, *(observed.peak.total for observed in self.observed))

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
    tracer: Tracer | None = None,
    versions: Versions = NOW,
    padding: float = 0.0,
) -> Predicted:
    """The memory of `cell` on the device of `profile`. The first step is traced; later ones are derived from it, unless
    the optimizer replaces its state in each: then each is traced.

    settings: of the allocator; None: torch's defaults, within the device's memory.  settle: whether cached memory is
    given back after the warm-up, as it is when a cell is measured.  tracer: of the same profile and versions, which has
    traced other cells before.  versions: of torch and transformers, whose rules are taken.
    padding: of a packed cell, the share of each sequence that is left out; others have none.
    Raises UserError: the cell cannot be built, or a trace cannot follow it.
    """
    begin = time.perf_counter()
    tracer = tracer or Tracer(profile, versions)
    traced = tracer(cell, warmup + steps, padding)
    settings = settings or AllocatorSettings(capacity=profile.memory_bytes - profile.context_bytes)
    return Predicted(
        profile,
        traced,
        settings,
        warmup,
        steps,
        settle,
        seconds=time.perf_counter() - begin,
        tokens=cell.batch_size * traced.tokens,
        work_of=partial(tracer.work, cell, warmup + steps, padding),
    )


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
    settling = 1 if cell.parallelism is None else PARALLELISMS[cell.parallelism].steps_to_settle
    predicted = predict(
        cell,
        profile,
        warmup=max(settling, protocol.warmup),
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
