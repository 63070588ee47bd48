"""The passes of one cell: build, memory, throughput, fidelity, each in its own window (docs/design.md 6)."""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from meftbench.backbones.build import AUTO_CLASSES, revision_of, tokenizer_of
from meftbench.errors import NOT_COMPARABLE, CellFailure, UserError, is_out_of_memory
from meftbench.own_code import blamed, digests_of, looked_at
from meftbench.plan.catalogue import BACKBONES, LEVERS, PROBES, resolve
from meftbench.plan.cell import Cell
from meftbench.plan.factories import CALLS, calls_of
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import PRELOAD
from meftbench.prediction.predict import predicted_cell
from meftbench.probes.counted_metrics import parameter_counts
from meftbench.probes.levers import check_levers
from meftbench.probes.memory_counted import CountedStep
from meftbench.probes.nvml import DeviceReading, open_device
from meftbench.probes.subject import Subject
from meftbench.records.record import Metric
from meftbench.step import Step, attention_used, build_step, is_own


@dataclass
class Outcome:
    """What measuring a cell gave. observed: fields of the record's `cell` that only a run can tell."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)


def measure_cell(cell: Cell, protocol: Protocol) -> Outcome:
    """Build the cell and run the protocol's passes; of a predicted cell, its memory alone.

    Raises CellFailure (oom, error: lever-not-engaged) and UserError (what cannot be built, no such device).
    """
    if cell.device.startswith("predicted:"):
        metrics, observed = predicted_cell(cell, protocol)
        return Outcome(metrics | _host_peak(), observed)
    device = _device(cell, protocol)
    if device.type == "cpu" and "memory" in protocol.passes:
        for lever in cell.levers.names():
            if LEVERS[lever].uncounted is not None:
                cure = "write passes: [throughput, reconstruction], or use --device cuda"
                raise UserError(cell.label, str(LEVERS[lever].uncounted), cure)
    if not is_own(cell):
        return _measured(cell, protocol, device)
    with blamed([name for name, _ in calls_of([cell])]):
        return _measured(cell, protocol, device)


def _measured(cell: Cell, protocol: Protocol, device: torch.device) -> Outcome:
    outcome = Outcome()
    torch.manual_seed(cell.seed)
    begin = time.perf_counter()
    with _oom_is_a_result("load"):
        quality = None if cell.training is None else _quality(cell, device)
        step = build_step(cell, device, protocol.padding) if quality is None else quality.step()
    rebuilt = quality.step if quality else partial(build_step, cell, device, protocol.padding)
    outcome.metrics["build_s"] = Metric(time.perf_counter() - begin, "measured")
    outcome.metrics |= parameter_counts(step.model)
    outcome.observed["model_revision"] = revision_of(step.model)
    outcome.observed["inputs"] = "own" if cell.batch else "text" if tokenizer_of(cell.model) else "random tokens"
    if is_own(cell):
        outcome.observed["own_code"] = digests_of(name for name, _ in calls_of([cell]))
    begin = time.perf_counter()
    with _oom_is_a_result(step):
        subject = Subject(cell, protocol, step, device_reading(device))
        ordinary = cell.training is not None and cell.training.ordinary
        for name, entry in PROBES.items():
            # Of a training by ordinary autograd nothing is reconstructed.
            if name in protocol.passes and not (ordinary and name == "reconstruction"):
                if name == "reconstruction":
                    subject = replace(subject, step=_sane(step, rebuilt))
                with step.applied.ordinary() if ordinary else nullcontext():
                    given = resolve(entry.home)(subject)
                if not entry.usual and (twice := sorted(given.keys() & outcome.metrics.keys())):
                    raise UserError(f"pass {name}", f"gives {twice[0]}, which another has given", "name it otherwise")
                outcome.metrics |= given
        step = _sane(step, rebuilt)
        if not step.steps_run and not any(not stack.arithmetic.exact for stack in step.applied.stacks):
            step.run()
        with CountedStep(step) as counted:
            outcome.metrics |= check_levers(step, cell)
        if (widenings := step.applied.range_widenings) is not None:
            outcome.metrics["range_widenings"] = Metric(widenings, "counted")
        outcome.observed["attention_used"] = attention_used(cell, counted.counter.attention_kernels)
    outcome.metrics["passes_s"] = Metric(time.perf_counter() - begin, "measured")
    if quality is not None:
        # What the passes have done to these weights must not reach the training.
        del step, subject
        gc.collect()
        torch.manual_seed(cell.seed)
        with _oom_is_a_result("training"):
            scored, told = quality.train()
        outcome.metrics |= scored
        outcome.observed |= told | {"inputs": cell.training.task if cell.training else None}
    outcome.metrics |= _host_peak()
    return outcome


def _sane(step: Step, rebuilt: Callable[[], Step]) -> Step:
    """The step, or one built afresh where training steps have left weights that are not finite: the published
    arithmetic of MEFT may do that, and what it does to sane weights is the question."""
    if all(bool(torch.isfinite(parameter).all()) for parameter in step.applied.trained().values()):
        return step
    return rebuilt()


def _quality(cell: Cell, device: torch.device) -> Any:
    """Imported here: datasets, scikit-learn and Trainer are for those who train."""
    from meftbench.tasks.quality import QualityCell

    return QualityCell(cell, device)


def _device(cell: Cell, protocol: Protocol) -> torch.device:
    if cell.device == "counted":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(cell.label, "no CUDA device is available", "use --device counted", NOT_COMPARABLE)
    device = torch.device("cuda", 0)
    if protocol.memory_limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, protocol.memory_limit / total), device)
    return device


def device_reading(device: torch.device) -> DeviceReading | None:
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return open_device(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


@contextmanager
def _oom_is_a_result(where: Step | str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([0-9.]+) ?(bytes|KiB|MiB|GiB)", text)
        scale = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (None, None)
        raise CellFailure(
            "oom",
            type=type(error).__name__,
            message=text.splitlines()[0] if text else "out of memory",
            phase=where if isinstance(where, str) else where.phase,
            requested_bytes=round(float(asked[1]) * scale[asked[2]]) if asked else None,
            free_bytes=free,
            capacity_bytes=total,
        ) from error


def _host_peak() -> dict[str, Metric]:
    if platform.system() == "Windows":
        return {"host_rss_peak_bytes": Metric(None, "measured", absent="not known on Windows")}
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_rss_peak_bytes": Metric(peak, "measured")}


def preload() -> None:
    """Import what a cell will need, once for all cells of a fork server, and keep gc from walking it in each of them.

    What is imported here never becomes garbage; collecting at the edge of every window would cost more than a step.
    """
    import peft  # noqa: F401
    import transformers

    for name in BACKBONES:
        folder = name.removesuffix("_text")  # where transformers keeps the text half of a model of both
        importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    for name in AUTO_CLASSES.values():
        getattr(transformers, name)  # resolved on first use
    if os.environ.get(PRELOAD) == "tasks":
        importlib.import_module("meftbench.tasks.quality")
    gc.collect()
    gc.freeze()


def describe() -> dict[str, Any]:
    """What this torch is and how its backends are set, for environment.json; does not initialise CUDA.

    `code`: what was found of the functions that the parent process asked about (plan/factories.py).
    """
    asked = os.environ.get(CALLS)
    return ({"code": looked_at(json.loads(asked))} if asked else {}) | {
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "allow_tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "sdp_flash": torch.backends.cuda.flash_sdp_enabled(),
        "sdp_memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "sdp_math": torch.backends.cuda.math_sdp_enabled(),
    }
