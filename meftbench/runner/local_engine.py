"""The engine of this machine: a worker (runner/process.py) that forks a process for each cell."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import CALLS, FOLDER
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import PRELOAD
from meftbench.runner import gpus, host
from meftbench.runner.data_check import read_data
from meftbench.runner.engine import COUNTED, CUDA, Slot, Work, check_torch, kind_of
from meftbench.runner.environment import environment
from meftbench.runner.job import Job, Machine, Outcome
from meftbench.runner.process import Worker, worker_environment


class LocalEngine:
    """One slot a GPU for cells on CUDA, `jobs` slots for all others.

    gpu_indices: the devices to use, as `nvidia-smi` counts them; empty: the first `jobs`.
    command, nvml: replace the worker and `pynvml`.
    """

    def __init__(
        self,
        jobs: int = 1,
        gpu_indices: tuple[int, ...] = (),
        command: Sequence[str] | None = None,
        nvml: Any = None,
    ) -> None:
        self._jobs, self._gpu_indices, self._command, self._nvml = jobs, gpu_indices, command, nvml
        self._visible: list[str] = []  # a value of CUDA_VISIBLE_DEVICES for each slot with a GPU
        self._without_gpu = 0  # slots
        self._slots: list[Slot] = []
        self._worker: Worker | None = None

    def survey(self, work: Work) -> None:
        """Raises UserError: CUDA is asked for and absent, or busy (exit 4); no cell runs on the `gpu_indices`."""
        self._gpus = gpus.read(self._nvml)
        kinds = {kind_of(cell) for cell in work.cells}
        if CUDA in kinds:
            self._visible = gpus.slots(self._gpus, self._gpu_indices, self._jobs, os.environ)
            if work.protocol.exclusive:
                gpus.refuse_shared(self._gpus, self._visible)
        elif self._gpu_indices:
            raise UserError("--gpus", "no cell of the suite runs on cuda", "add `--device cuda`, or leave it out")
        self._without_gpu = self._jobs if COUNTED in kinds else 0

    def data_answers(self, cells: Sequence[Cell]) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """The data as they are on this machine; none are read where the worker is replaced, which reads none."""
        return {} if self._command else {"": read_data(cells)}

    def start(self, work: Work, logs: Path) -> list[Machine]:
        """Start the worker. Raises UserError: it cannot start, or torch is built without the CUDA that is needed."""
        parallel = len(self._visible) + self._without_gpu
        threads = threads_of(work.protocol, parallel)
        self._worker = Worker(worker_variables(work, threads), logs / "worker.log", self._command)
        machine = machine_of(self._gpus, self._worker.facts)
        check_torch(work, machine)
        memory_bytes = host.available_bytes() // parallel
        # No limit of host memory with CUDA, which maps far more memory than it uses; the device's allocator reports
        # when it is out.
        self._slots = [Slot(f"gpu {gpu}", frozenset({CUDA}), gpu, threads) for gpu in self._visible]
        self._slots += [
            Slot(f"cpu {number}", frozenset({COUNTED}), "", threads, memory_bytes)
            for number in range(self._without_gpu)
        ]
        return [machine]

    def slots(self) -> list[Slot]:
        return self._slots

    def give(self, job: Job, slot: Slot) -> None:
        assert self._worker is not None, "`start` comes first"
        self._worker.give(job)

    def poll(self) -> Outcome | None:
        assert self._worker is not None, "`start` comes first"
        return self._worker.poll()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None


def threads_of(protocol: Protocol, parallel: int) -> int:
    """CPU threads of each of `parallel` cells: those of the protocol, or a share of those that this process may use."""
    omp_threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(omp_threads) if omp_threads.isdecimal() and int(omp_threads) else host.cores()
    return protocol.threads or max(1, cores // parallel)


def worker_variables(work: Work, threads: int) -> dict[str, str]:
    """The environment variables of a worker that is to run the cells of `work`."""
    variables = worker_environment(work.protocol, threads, os.environ)
    if any(cell.training for cell in work.cells):
        variables |= {PRELOAD: "tasks"}
    if work.calls:
        variables |= {FOLDER: os.getcwd(), CALLS: json.dumps(work.calls)}
    return variables


def machine_of(devices: gpus.Gpus, worker_facts: Mapping[str, Any]) -> Machine:
    """This machine. worker_facts: what its worker reports of torch, and of the user's own code."""
    torch_facts = dict(worker_facts)
    code = torch_facts.pop("code", {})
    return Machine(socket.gethostname(), environment(devices, torch_facts), code)
