"""Stands in for meftbench.measuring.requests in tests: loads no torch, and does what the cell's seed says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from meftbench.errors import CellFailure, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import CALLS
from meftbench.plan.protocol import Protocol
from meftbench.records.record import Metric

FINE, BRIEF, OUT_OF_MEMORY, HOST_OUT_OF_MEMORY, BROKEN, WRONG, CRASHED, KILLED, SILENT, ENDLESS, PARENT, INFINITE = (
    range(12)
)
TALKATIVE, NOT_A_NUMBER, HOARDER, STUBBORN, CPU_ALLOCATOR, QUITTER = range(12, 18)


@dataclass
class Outcome:
    metrics: dict[str, Metric]
    observed: dict[str, Any]


def describe() -> dict[str, Any]:
    facts: dict[str, Any] = {"torch_version": "none: a stand-in"}
    if asked := os.environ.get(CALLS):
        from meftbench.own_code import looked_at  # imports torch

        facts["code"] = looked_at(json.loads(asked))
    return facts


def measure_cell(cell: Cell, protocol: Protocol) -> Outcome:
    tell(f"{cell.cell_id} {os.getpid()}")
    shift: float = 0.5
    match cell.seed:
        case s if s == BRIEF:
            time.sleep(0.01)
        case s if s == OUT_OF_MEMORY:
            raise CellFailure("oom", type="OutOfMemoryError", message="no room", phase="backward", requested_bytes=4096)
        case s if s == HOST_OUT_OF_MEMORY:
            raise MemoryError
        case s if s == CPU_ALLOCATOR:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
            )
        case s if s == BROKEN:
            raise ZeroDivisionError("a bug in a probe")
        case s if s == WRONG:
            raise UserError("model", "has no weights", "download it")
        case s if s == CRASHED:
            os.kill(os.getpid(), signal.SIGSEGV)
        case s if s == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        case s if s == SILENT:
            print("last words", flush=True)
            os._exit(0)
        case s if s == QUITTER:
            sys.exit("leaving")
        case s if s == ENDLESS:
            time.sleep(600)
        case s if s == STUBBORN:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case s if s == PARENT:
            child = subprocess.Popen(["sleep", "600"])
            tell(f"grandchild {child.pid}")
            time.sleep(600)
        case s if s == INFINITE:
            shift = float("inf")
        case s if s == NOT_A_NUMBER:
            return Outcome({}, {"attention_used": float("nan")})
        case s if s == TALKATIVE:
            # As a library would that writes to stdout, a program it starts, and one that tries every descriptor.
            forged = b'{"event": "exited", "id": 1, "pid": 1, "code": 0}\n'
            subprocess.run(["echo", forged.decode().strip()], check=True)
            for descriptor in [1, *range(3, 64)]:
                with suppress(OSError):
                    os.write(descriptor, forged)
        case s if s == HOARDER:
            bytearray(2**30)
    metrics = {
        "activation_peak_bytes": Metric(1000 * cell.batch_size, "counted"),
        "starting_point_shift": Metric(shift, "counted"),
    }
    if cell.training is not None:
        # 1e-3 is the best of rates, so that a grid has one to choose.
        score = 1 - abs(math.log10(cell.training.learning_rate) + 3) / 10
        metrics |= {"score": Metric(score, "measured"), "learning_curve": Metric([[4, 0.5, score]], "measured")}
        metrics |= {"training_time_s": Metric(2.0, "measured"), "training_tokens_per_s": Metric(100.0, "measured")}
    return Outcome(metrics, {"attention_used": "sdpa", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")})


def tell(text: str) -> None:
    """Append a line to the file that a test names in STAND_IN_TOLD."""
    if told := os.environ.get("STAND_IN_TOLD"):
        with open(told, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def measure(request, _tell) -> dict[str, Any]:
    cell = Cell.model_validate_json(json.dumps(request["cell"]))
    outcome = measure_cell(cell, Protocol.model_validate_json(json.dumps(request["protocol"])))
    metrics = {name: metric.to_json(name) for name, metric in outcome.metrics.items()}
    return {"metrics": metrics, "observed": outcome.observed}


VERBS = {"measure": measure}
