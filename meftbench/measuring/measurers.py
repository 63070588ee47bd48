"""Three ways to get a cell's metrics: counted on a CPU, measured on a GPU, predicted for a GPU that is not present."""

from __future__ import annotations

from typing import Protocol

import torch

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.profiles import PREDICTED
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.measuring.passes import Measured, run_passes
from meftbench.measuring.ranks import run_ranks
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol as MeasuringProtocol
from meftbench.prediction.predict import predicted_cell
from meftbench.probes.host_memory import host_peak
from meftbench.probes.nvml import reading_of


class Measurer(Protocol):
    """Gets the metrics of cells on one kind of device."""

    def measure(self, cell: Cell, protocol: MeasuringProtocol) -> Measured:
        """Raises CellFailure (oom, error: lever-not-engaged) and UserError (what cannot be built, no such device)."""


class Counted:
    """On a CPU: memory is the bytes of live tensors, counted; time is that of this machine."""

    def measure(self, cell: Cell, protocol: MeasuringProtocol) -> Measured:
        """Raises UserError, too, for a memory optimisation (lever) that needs a GPU, or under which memory cannot be
        counted."""
        for lever in cell.levers.names():
            if LEVERS[lever].needs_gpu is not None:
                cure = "use --device cuda or predicted:PROFILE, or leave it out"
                raise UserError(cell.label, f"{lever}: {LEVERS[lever].needs_gpu}", cure)
        if "memory" in protocol.passes:
            for lever in cell.levers.names():
                if LEVERS[lever].uncounted is not None:
                    cure = "write passes: [throughput, reconstruction], or use --device cuda"
                    raise UserError(cell.label, str(LEVERS[lever].uncounted), cure)
        if cell.parallelism is not None:
            return run_ranks(cell, protocol, "cpu")
        return run_passes(cell, protocol, torch.device("cpu"), None)


class Cuda:
    """On the first visible GPU, or on as many as there are ranks: memory is what torch's allocator and the driver
    report."""

    def measure(self, cell: Cell, protocol: MeasuringProtocol) -> Measured:
        """Raises UserError, too, where there is no GPU (exit code 3)."""
        if cell.parallelism is not None:  # this process does not initialise CUDA, its children do
            return run_ranks(cell, protocol, "cuda")
        if not torch.cuda.is_available():
            raise UserError(cell.label, "no CUDA device is available", "use --device counted", NOT_COMPARABLE)
        device = torch.device("cuda", 0)
        if protocol.memory_limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, protocol.memory_limit / total), device)
        return run_passes(cell, protocol, device, reading_of(device))


class Predicted:
    """For the GPU of a device profile: memory follows from a trace of the step; nothing is computed."""

    def measure(self, cell: Cell, protocol: MeasuringProtocol) -> Measured:
        """Only the memory pass is predicted, whatever passes the protocol has."""
        return Measured(*predicted_cell(cell, protocol))


MEASURERS: dict[str, Measurer] = {"counted": Counted(), "cuda": Cuda(), PREDICTED.rstrip(":"): Predicted()}


def measure_cell(cell: Cell, protocol: MeasuringProtocol) -> Measured:
    """The metrics of a cell, by the measurer of its device.

    Raises CellFailure (oom, error: lever-not-engaged) and UserError (what cannot be built, no such device).
    """
    measured = MEASURERS[cell.device.partition(":")[0]].measure(cell, protocol)
    measured.metrics.setdefault("host_rss_peak_bytes", host_peak())  # ranks have told theirs
    return measured
