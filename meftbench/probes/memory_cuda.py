"""Memory on CUDA: the allocator's four peaks per phase, and what lies outside torch (docs/measuring.md 2, 4)."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Protocol

import torch

from meftbench.measuring.step import PHASES, Step
from meftbench.probes.counted_metrics import paged_metrics, peak_buffers
from meftbench.probes.memory_counted import CountedStep, Observed, warmup_steps
from meftbench.probes.nvml import DeviceReading
from meftbench.probes.storage_counter import CATEGORIES
from meftbench.records.record import Metric

# Metric name -> the allocator's statistic. requested <= allocated <= active <= reserved.
PEAKS = {
    "peak_requested_bytes": "requested_bytes.all.peak",
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_active_bytes": "active_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
}
ALLOCATED, RESERVED = "allocated_bytes.all.current", "reserved_bytes.all.current"


class Allocator(Protocol):
    """What the probe reads from the device's allocator; tests have a substitute."""

    def statistics(self) -> dict[str, int]:
        """As torch.cuda.memory_stats()."""
        ...

    def reset_peaks(self) -> None: ...

    def settle(self) -> None:
        """Wait for the device and give cached segments back, so that reserved memory is that of this window."""
        ...


class TorchAllocator:
    """The CUDA caching allocator of the current device."""

    def statistics(self) -> dict[str, int]:
        values: dict[str, int] = torch.cuda.memory_stats()
        return values

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def settle(self) -> None:
        # In this order: old cached segments count as reserved, though not as allocated (docs/measuring.md 4).
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


@dataclass
class Window:
    """One step: bytes allocated before it, held at the end of forward, and the four peaks of each phase."""

    baseline: int
    saved: int
    peaks: dict[str, dict[str, int]]  # phase -> metric name -> bytes

    def peak(self, name: str) -> int:
        return max(peaks[name] for peaks in self.peaks.values())

    @property
    def activation_peak(self) -> int:
        return max(self.peaks[phase]["peak_allocated_bytes"] for phase in ("forward", "backward")) - self.baseline

    @property
    def phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase]["peak_allocated_bytes"])


def observe(step: Step, allocator: Allocator) -> Window:
    """One step under the allocator's statistics, which it keeps on the host: no synchronisation is needed."""
    gc.collect()
    allocator.reset_peaks()
    baseline, saved = allocator.statistics()[ALLOCATED], 0
    peaks = {phase: dict.fromkeys(PEAKS, 0) for phase in PHASES}
    running: str | None = None

    def mark(phase: str) -> None:
        nonlocal running, saved
        statistics = allocator.statistics()
        if running is not None:
            for name, key in PEAKS.items():
                peaks[running][name] = max(peaks[running][name], statistics[key])
        if phase == "backward":
            saved = max(saved, statistics[ALLOCATED] - baseline)
        allocator.reset_peaks()
        running = phase

    step.run(mark)
    return Window(baseline, saved, peaks)


def measure_memory(
    step: Step, warmup: int, steps: int, allocator: Allocator, read_device: DeviceReading | None
) -> dict[str, Metric]:
    """Metrics of the measured steps; the breakdown at the peak comes from two more steps under the counter.

    read_device: NVML's view of the device; None or absent values are recorded with their reason.
    """
    allocator.settle()
    warm = [observe(step, allocator) for _ in range(warmup_steps(step, warmup))]
    allocator.settle()
    measured = [observe(step, allocator) for _ in range(steps)]
    statistics = allocator.statistics()
    worst = max(measured, key=lambda window: window.peak("peak_allocated_bytes"))
    peak_allocated = worst.peak("peak_allocated_bytes")
    metrics = {name: _over_phases(name, measured) for name in PEAKS}
    metrics |= {
        "baseline_allocated_bytes": _over_steps([w.baseline for w in measured]),
        "activation_peak_bytes": _over_steps([w.activation_peak for w in measured]),
        "saved_bytes": _over_steps([w.saved for w in measured]),
        "optimizer_peak_bytes": _over_steps([w.peaks["optimizer"]["peak_allocated_bytes"] for w in measured]),
        "first_step_peak_allocated_bytes": _measured((warm or measured)[0].peak("peak_allocated_bytes")),
        "drift_bytes_per_step": _measured((measured[-1].baseline - measured[0].baseline) / max(1, steps - 1)),
        "peak_phase": Metric(worst.phase, "measured"),
        "fragmentation_ratio": _measured(1 - peak_allocated / max(1, worst.peak("peak_reserved_bytes"))),
        "alloc_retries": _measured(statistics.get("num_alloc_retries", 0)),
        "ooms": _measured(statistics.get("num_ooms", 0)),
        "device_allocs": _measured(statistics.get("num_device_alloc", 0)),
        "paper_meft_activation_bytes": _measured(peak_allocated - statistics[ALLOCATED]),
        "paper_lst_memory": _measured(peak_allocated),
    }
    metrics |= paged_metrics(step, "measured") | _outside_torch(statistics[RESERVED], read_device)
    with CountedStep(step) as counted:
        # The first of them shows how high the peak is, and the second what is alive there.
        observed = [counted.run(), counted.run()]
    metrics["peak_buffers"] = peak_buffers(observed)
    return metrics | breakdown(observed[-1], worst.baseline, peak_allocated)


def breakdown(counted: Observed, baseline: int, peak_allocated: int) -> dict[str, Metric]:
    """Categories at the peak, which sum to `peak_allocated`; and the gradients at the peak of forward and backward.

    Both peaks are those of the counted storages, since the allocator does not tell what its bytes are. What it has
    allocated before the step beyond the counted storages is workspace (cuBLAS and others keep it); the remainder at the
    peak, in `other_bytes`, is memory that kernels allocate and free while they run.
    """
    metrics = {f"{name}_bytes": _measured(counted.peak.breakdown.get(name, 0)) for name in CATEGORIES}
    workspace = baseline - counted.baseline
    metrics["workspace_bytes"] = _measured(workspace)
    metrics["activation_gradients_bytes"] = _measured(counted.gradients)
    beyond = peak_allocated - counted.peak.total - workspace
    metrics["other_bytes"] = _measured(counted.peak.breakdown.get("other", 0) + beyond)
    return metrics


def _outside_torch(reserved: int, read_device: DeviceReading | None) -> dict[str, Metric]:
    if read_device is None:
        why = "NVML is not available"
        return {name: Metric(None, "measured", absent=why) for name in ("process_device_bytes", "context_bytes")}
    memory = read_device.memory()
    process = memory["process_device_bytes"]
    context = (
        Metric(process.value - reserved, "measured")
        if isinstance(process.value, int)
        else Metric(None, "measured", absent=process.absent)
    )
    return {**memory, "context_bytes": context}


def _measured(value: float) -> Metric:
    return Metric(value, "measured")


def _over_steps(values: list[int]) -> Metric:
    return Metric(max(values), "measured", n=len(values), min=min(values), max=max(values))


def _over_phases(name: str, windows: list[Window]) -> Metric:
    whole = [window.peak(name) for window in windows]
    phases = {phase: max(window.peaks[phase][name] for window in windows) for phase in PHASES}
    top = max(whole)
    return Metric(top, "measured", n=len(whole), min=min(whole), max=top, phases={**phases, "step": top})
