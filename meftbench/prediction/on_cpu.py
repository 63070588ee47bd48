"""A cell's step as this machine's processor would run it, traced without values: its memory and its work.

Memory is counted as a counted cell's is (docs/measuring.md), without an allocator: the C library's, which gives memory
back and takes it anew as it sees fit, has no rules that could be replayed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from meftbench.catalogue.operations import Operator, Work
from meftbench.measuring.step import Step
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import Event
from meftbench.prediction.fake_ranks import fake_rank
from meftbench.prediction.host_heap import fresh_bytes
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.trace import blamed_step, named_refusals, uncomputed_step
from meftbench.prediction.working_counter import WorkingCounter
from meftbench.probes.counted_metrics import parameter_counts, step_metrics
from meftbench.probes.memory_counted import CountedStep, Observed
from meftbench.probes.sharded_tensors import DTensor
from meftbench.records.record import Metric


class _CpuCounter(WorkingCounter):
    """A storage counter that also counts what operators do."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls operators on its local part, which come here
        result = self._call(func, args, kwargs)
        self.returned(func.__name__, result)
        self.work.count(func, args, kwargs or {}, result, self._call.key)
        return result


class _TracedStep(CountedStep):
    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self.counter: _CpuCounter = _CpuCounter(
            step.device.type,
            Remembered(),  # remembers nothing of tensors on a CPU, but says which calls are alike
        )


@dataclass(frozen=True)
class OnCpu:
    """observed: of the first step, which makes the optimizer's states, and of the one after it; sizes in blocks of 512
    bytes.  work: of the second.  tokens: of a batch.  sizes: numbers of parameters.  seconds: that the trace took.
    attention: fused attention operators that ran."""

    observed: list[Observed]
    work: Work
    tokens: int
    sizes: dict[str, Metric]
    seconds: float
    attention: set[str]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The memory metrics of a counted cell's record, source predicted."""
        return self.sizes | step_metrics(self.observed[:1], self.observed[1:], "predicted")


def trace_on_cpu(cell: Cell) -> OnCpu:
    """Trace two steps of `cell` by the CPU's operators; no sequence has padding.

    Raises UserError: the cell cannot be built, or a trace cannot follow it.
    """
    begin = time.perf_counter()
    with fake_rank(cell) as rank:
        step, mode = uncomputed_step(cell, rank=rank)
        traced = _TracedStep(step)
        with blamed_step(cell), named_refusals(cell), mode, traced, traced.counter.work.entered():
            observed = [traced.run()]
            first_events = len(traced.counter.events or [])
            observed.append(traced.run())
    counter, events = traced.counter, traced.counter.events
    counter.work.phase = "forward"
    assert events is not None
    fresh = fresh_bytes([Event(*event) for event in events], first_events)
    counter.work.add(Operator("pages", "fresh", "", (), 0, 0, fresh, 0.0))
    seconds = time.perf_counter() - begin
    tokens = cell.batch_size * step.sequence_length
    return OnCpu(observed, counter.work.work, tokens, parameter_counts(step.model), seconds, counter.attention_kernels)
