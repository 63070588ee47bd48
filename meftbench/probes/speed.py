"""Throughput: time of a step and of its phases, after warm-up, in a window of its own (docs/design.md 6)."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from meftbench.measuring.step import PHASES, Step
from meftbench.probes.cpu_wait import CpuWait
from meftbench.probes.subject import Subject
from meftbench.records.record import Metric


class Clock:
    """Times phases: CUDA events where there is a GPU (no synchronisation inside the step), else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """The phase `phase` begins; "end": the last one ends."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, summed over micro-batches, and of the "step"; the marks are cleared."""
        if self._cuda:
            torch.cuda.synchronize()
        spent = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        self._marks.clear()
        return spent | {"step": sum(spent.values())}


def probe(subject: Subject) -> dict[str, Metric]:
    """Speed metrics of the cell, and on a GPU the conditions they were taken under."""
    metrics = time_steps(subject.step, subject.protocol.warmup, subject.protocol.steps)
    return metrics | (subject.reading.conditions() if subject.reading else {})


def time_steps(step: Step, warmup: int, steps: int) -> dict[str, Metric]:
    """Speed metrics over `steps` steps; always "measured", on the GPU or on this CPU."""
    clock = Clock(step.device)
    for _ in range(warmup):
        step.run(clock.mark)
        clock.seconds()
    gc.collect()
    timed, cpu_wait = [], CpuWait()
    for _ in range(steps):
        step.run(clock.mark)
        timed.append(clock.seconds())
    share = cpu_wait.share()
    step_s = quartiles([seconds["step"] for seconds in timed])
    assert isinstance(step_s.value, float)
    metrics = {"step_time_s": step_s, "cpu_wait_share": share}
    for phase in PHASES:
        metrics[f"{phase}_s"] = Metric(statistics.median(seconds[phase] for seconds in timed), "measured", n=steps)
    metrics["tokens_per_s"] = Metric(step.tokens / step_s.value, "measured", n=steps)
    metrics["samples_per_s"] = Metric(step.batch_size / step_s.value, "measured", n=steps)
    return metrics


def quartiles(samples: list[float]) -> Metric:
    """The median as value, the quartiles as min and max, and all samples."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Metric(median, "measured", n=len(samples), min=low, max=high, samples=samples)
