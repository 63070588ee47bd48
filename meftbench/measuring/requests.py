"""The requests that meftbench.worker carries out in a process with torch, by verb.

Each verb takes a request, a dictionary that came as JSON, and a function to call with lines of progress; it returns an
answer that can be written as JSON, or raises CellFailure or UserError.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from meftbench.backbones.build import AUTO_CLASSES
from meftbench.catalogue.backbones import BACKBONES
from meftbench.measuring.measurers import measure_cell
from meftbench.own_code import looked_at
from meftbench.plan.cell import Cell
from meftbench.plan.factories import CALLS
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import PRELOAD
from meftbench.prediction.allocations import allocations
from meftbench.prediction.calibration import calibrate
from meftbench.prediction.capacity import fit
from meftbench.prediction.estimate import estimate
from meftbench.prediction.search import plan
from meftbench.prediction.timeline import export

Verb = Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]]


def measure(request: dict[str, Any], _tell: Callable[[str], None]) -> dict[str, Any]:
    """The metrics of one cell. request: `cell` and `protocol`, as their models write them.

    The answer: `metrics`, each with unit and source, and `observed`, fields of the record's `cell`.
    """
    # Through JSON text: only from that do strict pydantic models accept an object as a nested model.
    cell = Cell.model_validate_json(json.dumps(request["cell"]))
    measured = measure_cell(cell, Protocol.model_validate_json(json.dumps(request["protocol"])))
    metrics = {name: metric.to_json(name) for name, metric in measured.metrics.items()}
    return {"metrics": metrics, "observed": measured.observed}


VERBS: dict[str, Verb] = {
    "measure": measure,
    "estimate": estimate,
    "fit": fit,
    "plan": plan,
    "export": export,
    "allocations": allocations,
    "calibrate": calibrate,
}


def preload() -> None:
    """Import what cells need, once for all cells of a fork server, and exempt it from garbage collection.

    What is imported here never becomes garbage; going through it at every window would take longer than a step.
    """
    import peft  # noqa: F401
    import transformers

    for name in BACKBONES:
        folder = name.removesuffix("_text")  # the text part of a model for text and images has no folder of its own
        importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    for name in AUTO_CLASSES.values():
        getattr(transformers, name)  # transformers imports it on first use
    if os.environ.get(PRELOAD) == "tasks":
        importlib.import_module("meftbench.tasks.fine_tuning")
    gc.collect()
    gc.freeze()


def describe() -> dict[str, Any]:
    """Version and settings of torch, for environment.json; does not initialise CUDA.

    `code`: facts about the user's own functions that the parent process asks about (plan/factories.py).
    """
    calls = os.environ.get(CALLS)
    return ({"code": looked_at(json.loads(calls))} if calls else {}) | {
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
