"""The memory pass: counted on the CPU, measured by the allocator on CUDA."""

from __future__ import annotations

from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.memory_cuda import TorchAllocator, measure_memory
from meftbench.probes.subject import Subject
from meftbench.records.record import Metric


def probe(subject: Subject) -> dict[str, Metric]:
    """Memory metrics of the cell. Raises CellFailure (oom) where a counted step exceeds the memory limit."""
    step, protocol = subject.step, subject.protocol
    if step.device.type == "cuda":
        return measure_memory(step, protocol.warmup, protocol.steps, TorchAllocator(), subject.reading)
    return count_memory(step, protocol.warmup, protocol.steps, protocol.memory_limit)
