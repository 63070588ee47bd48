"""Metrics from counted steps: peaks, what they consist of, and how many parameters there are (docs/measuring.md 2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from torch import nn

from meftbench.measuring.optimizers import paged_bytes
from meftbench.measuring.step import Step
from meftbench.probes.memory_counted import CountedStep, Observed, warmup_steps
from meftbench.probes.storage_counter import CATEGORIES, Origin
from meftbench.records.checks import Source
from meftbench.records.record import Metric


def count_memory(step: Step, warmup: int, steps: int, limit: int | None = None) -> dict[str, Metric]:
    """Metrics of the counted steps; peaks are the largest over them (docs/measuring.md 2). Raises CellFailure (oom)."""
    with CountedStep(step, limit=limit) as counted:
        warm = [counted.run() for _ in range(warmup_steps(step, warmup))]
        measured = [counted.run() for _ in range(steps)]
        total_after = counted.counter.total
    peak = max(observed.peak.total for observed in [*warm, *measured])
    return step_metrics(warm, measured, "counted") | {
        "peak_buffers": peak_buffers(measured),
        "host_pinned_peak_bytes": Metric(max(o.host_peak for o in measured), "counted"),
        "paper_meft_activation_bytes": Metric(peak - total_after, "counted"),
        "paper_lst_memory": Metric(peak, "counted"),
        **paged_metrics(step, "counted"),
    }


def paged_metrics(step: Step, source: Source) -> dict[str, Metric]:
    """The bytes of states in CUDA's unified memory, where the step's optimizer has such. After the first step."""
    paged = paged_bytes(step.optimizer)
    return {} if paged is None else {"optimizer_paged_bytes": Metric(paged, source)}


def peak_buffers(measured: list[Observed]) -> Metric:
    """What the peak of forward and backward consists of beside parameters, buffers, optimizer state and host memory,
    largest first: storages of one kind are counted together, and listed from 1 % of the activation peak on, apart for
    each module of the model that they are of."""
    worst = max(measured, key=lambda observed: (bool(observed.buffers), observed.activation_peak))
    if not worst.buffers:
        return Metric(None, "counted", absent="takes two steps: the first tells how high the peak is")
    counts = Counter(entry for entry in worst.buffers if entry[1] not in ("parameters", "buffers", "optimizer", "host"))
    # Of a kind in all modules together: which kinds are listed does not depend on how many modules a model has.
    of_kind: Counter[tuple[int, str, Origin]] = Counter()
    for (size, category, origin), count in counts.items():
        of_kind[size, category, origin._replace(module=None)] += size * count
    rows = [
        {"bytes": size * count, "count": count, "category": category, **origin._asdict(), "shape": list(origin.shape)}
        for (size, category, origin), count in counts.items()
        if of_kind[size, category, origin._replace(module=None)] >= worst.activation_peak / 100
    ]
    return Metric(sorted(rows, key=lambda row: -row["bytes"]), "counted")


def step_metrics(warm: list[Observed], measured: list[Observed], source: Source) -> dict[str, Metric]:
    """The memory of each phase and the breakdown at the peak, from observed steps; `warm` are the warm-up steps."""

    def over_steps(value: Callable[[Observed], int]) -> Metric:
        values = [value(observed) for observed in measured]
        return Metric(max(values), source, n=len(values), min=min(values), max=max(values))

    worst = max(measured, key=lambda observed: observed.peak.total)
    phases = {name: max(o.phase_peaks.get(name, 0) for o in measured) for name in ("forward", "backward", "optimizer")}
    first = (warm or measured)[0]
    drift = (measured[-1].baseline - measured[0].baseline) / max(1, len(measured) - 1)
    metrics = {
        "peak_allocated_bytes": Metric(
            worst.peak.total,
            source,
            n=len(measured),
            min=min(o.peak.total for o in measured),
            max=worst.peak.total,
            phases={**phases, "step": worst.peak.total},
        ),
        "baseline_allocated_bytes": over_steps(lambda o: o.baseline),
        "activation_peak_bytes": over_steps(lambda o: o.activation_peak),
        "activation_gradients_bytes": over_steps(lambda o: o.gradients),
        "saved_bytes": over_steps(lambda o: o.saved),
        "optimizer_peak_bytes": over_steps(lambda o: o.phase_peaks.get("optimizer", 0)),
        "first_step_peak_allocated_bytes": Metric(first.peak.total, source),
        "drift_bytes_per_step": Metric(drift, source),
        "peak_phase": Metric(worst.peak.phase, source),
        "timeline": Metric(worst.timeline, source),
    }
    for category in CATEGORIES:
        metrics[f"{category}_bytes"] = Metric(worst.peak.breakdown.get(category, 0), source)
    metrics["workspace_bytes"] = Metric(worst.peak.breakdown.get("workspace", 0), source)
    return metrics


def parameter_counts(model: nn.Module) -> dict[str, Metric]:
    """Numbers of all and of trained parameters, each counted once if used repeatedly, and the trained ones' bytes."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return {
        "parameters_total": Metric(sum(_weights_in(p) for p in parameters), "counted"),
        "parameters_trainable": Metric(sum(p.numel() for p in trained), "counted"),
        "adapter_file_bytes": Metric(sum(p.nbytes for p in trained), "counted"),
    }


def _weights_in(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds: those that were packed, where bitsandbytes has packed two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
