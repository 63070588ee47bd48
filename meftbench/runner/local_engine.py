"""The engine of this machine: a worker (runner/process.py) that forks a process for each cell."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meftbench.catalogue.profiles import CARD
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import CALLS, FOLDER
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import PRELOAD
from meftbench.runner import gpus, host
from meftbench.runner.data_check import read_data
from meftbench.runner.engine import COUNTED, CUDA, Slot, Work, check_torch, refuse_without_slot
from meftbench.runner.environment import environment
from meftbench.runner.job import Job, Machine, Outcome
from meftbench.runner.process import Worker, worker_environment

_ALL = 1024  # GPUs, more than a machine has


class LocalEngine:
    """One slot a GPU for cells on CUDA, or one for as many GPUs as ranks need; `jobs` slots for all others.

    gpu_indices: the devices to use, as `nvidia-smi` counts them; empty: as many as `jobs` slots need.
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
        self._of_gpu: dict[str, frozenset[str]] = {}  # kinds of cells by the CUDA_VISIBLE_DEVICES of a slot
        self._without_gpu = 0  # slots
        self._slots: list[Slot] = []
        self._worker: Worker | None = None

    def survey(self, work: Work) -> None:
        """Raises UserError: CUDA, or a card by name, is asked for and absent, or busy (exit 4); `gpu_indices`
        are given, and no cell runs on CUDA."""
        self._gpus = gpus.read(self._nvml)
        kinds = work.kinds
        if kinds - {COUNTED}:
            visible = gpus.slots(self._gpus, self._gpu_indices, _ALL, os.environ)
            of_gpu = {gpu: kinds_of_gpu(self._gpus, gpu, kinds) for gpu in visible}
            # Cards that are asked for by name come first, so that they are among the first `jobs`.
            usable = sorted((gpu for gpu in visible if of_gpu[gpu] & kinds), key=lambda gpu: of_gpu[gpu] == {CUDA})
            groups = _groups({gpu: of_gpu[gpu] for gpu in usable}, work.gpus)
            chosen = list(groups) if self._gpu_indices else list(groups)[: self._jobs]
            self._of_gpu = {gpus_of_slot: groups[gpus_of_slot] for gpus_of_slot in chosen}
            has = _devices(self._gpus, visible) + (f", and a cell needs {work.gpus} of a kind" * (work.gpus > 1))
            refuse_without_slot(kinds - {COUNTED}, self._of_gpu.values(), has)
            if work.protocol.exclusive:
                gpus.refuse_shared(self._gpus, ",".join(self._of_gpu).split(","))
        elif self._gpu_indices:
            raise UserError("--gpus", "no cell of the suite runs on cuda", "add `--device cuda`, or leave it out")
        self._without_gpu = self._jobs if COUNTED in kinds else 0

    def data_answers(self, cells: Sequence[Cell]) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """The data as they are on this machine; none are read where the worker is replaced, which reads none."""
        return {} if self._command else {"": read_data(cells)}

    def start(self, work: Work, logs: Path) -> list[Machine]:
        """Start the worker. Raises UserError: it cannot start, or torch is built without the CUDA that is needed."""
        parallel = len(self._of_gpu) + self._without_gpu
        threads = threads_of(work.protocol, parallel)
        self._worker = Worker(worker_variables(work, threads), logs / "worker.log", self._command)
        machine = machine_of(self._gpus, self._worker.facts)
        check_torch(work, machine)
        memory_bytes = host.available_bytes() // parallel
        # No limit of host memory with CUDA, which maps far more memory than it uses; the device's allocator reports
        # when it is out.
        self._slots = [Slot(f"gpu {gpu}", kinds, gpu, threads) for gpu, kinds in self._of_gpu.items()]
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
    named = re.fullmatch("0*([1-9][0-9]{0,5})", omp_threads, re.ASCII)  # more than a million says nothing
    cores = int(named[1]) if named else host.cores()
    return protocol.threads or max(1, cores // parallel)


def worker_variables(work: Work, threads: int) -> dict[str, str]:
    """The environment variables of a worker that is to run the cells of `work`."""
    variables = worker_environment(work.protocol, threads, os.environ)
    if work.trains:
        variables |= {PRELOAD: "tasks"}
    if work.calls:
        variables |= {FOLDER: work.folder, CALLS: json.dumps(work.calls)}
    return variables


def kinds_of_gpu(devices: gpus.Gpus, visible: str, asked: Iterable[str]) -> frozenset[str]:
    """The kinds of cells that may run on a GPU: any that need one, and those of `asked` that name its card."""
    names = [kind.removeprefix(CARD) for kind in asked if kind.startswith(CARD)]
    return frozenset({CUDA, *(CARD + name for name in gpus.cards(devices, visible, names))})


def _groups(of_gpu: Mapping[str, frozenset[str]], size: int) -> dict[str, frozenset[str]]:
    """Groups of `size` GPUs on which the same kinds of cells may run, with these kinds, by their value of
    CUDA_VISIBLE_DEVICES. of_gpu: kinds by GPU. GPUs of a kind that are left over are in no group."""
    alike: dict[frozenset[str], list[str]] = {}
    for gpu, kinds in of_gpu.items():
        alike.setdefault(kinds, []).append(gpu)
    return {
        ",".join(same[first : first + size]): kinds
        for kinds, same in alike.items()
        for first in range(0, len(same) - size + 1, size)
    }


def _devices(devices: gpus.Gpus, visible: Sequence[str]) -> str:
    seen = [device for device in devices.devices if {str(device["uuid"]), str(device["index"])} & {*visible}]
    names = sorted({str(device["name"]) for device in seen})
    return f"this machine has {', '.join(names) or 'no GPU that is known by name'}"


def machine_of(devices: gpus.Gpus, worker_facts: Mapping[str, Any]) -> Machine:
    """This machine. worker_facts: what its worker reports of torch, and of the user's own code."""
    torch_facts = dict(worker_facts)
    code = torch_facts.pop("code", {})
    return Machine(socket.gethostname(), environment(devices, torch_facts), code)
