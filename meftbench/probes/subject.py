"""The argument that probes are called with."""

from __future__ import annotations

from dataclasses import dataclass

from meftbench.measuring.step import Step
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.probes.nvml import DeviceReading


@dataclass(frozen=True)
class Subject:
    """A cell whose model and step are built.

    step: the one training step; earlier passes have run it, so optimizer state may or may not exist.
    reading: NVML's view of the device; None on the CPU and where NVML is not available.
    """

    cell: Cell
    protocol: Protocol
    step: Step
    reading: DeviceReading | None = None
