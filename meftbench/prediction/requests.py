"""Predictions for a process that must not import torch: a line of JSON asks on stdin, one answers on stdout.

Lines that precede the answer tell of progress: {"progress": text}. The answer is {"answer": ...}, or {"error": ...}
with the fields of a UserError.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from meftbench.backbones.own import transformers_part
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import OWN_ATTENTION, is_factory
from meftbench.plan.models import positions_in
from meftbench.plan.profiles import find_profile
from meftbench.prediction.allocator import AllocatorSettings, replay
from meftbench.prediction.largest import Axis, Shapes, largest
from meftbench.prediction.predict import predict
from meftbench.prediction.timeline import export
from meftbench.prediction.trace import uncomputed_model

Tell = Callable[[str], None]
CARDS_AT_A_TIME = 2


def estimate(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The memory of one cell. request: `cell`; `profile`, a name; `allocator`, as PYTORCH_ALLOC_CONF has it.

    The answer is in bytes and seconds. `reserved_bytes` is what torch would reserve on a card without an end;
    `fits` whether it gets by on the one there is, and `retries` how often it must give back what it has cached.
    """
    cell, profile = Cell.model_validate(request["cell"]), find_profile(request["profile"])
    settings = AllocatorSettings.parse(request["allocator"])
    tell(f"predicting {cell.label} on {profile.device}")
    found = predict(cell, profile, settings=settings)
    held = replay(found.events, replace(settings, capacity=profile.memory_bytes - profile.context_bytes))
    # The first step of all is the largest where the optimizer has temporaries that later steps have not.
    worst = max([*found.warm, *found.measured], key=lambda observed: observed.peak.total)
    breakdown = worst.peak.breakdown
    return {
        "label": cell.label,
        "profile": profile.name,
        "device": profile.device,
        "verified": profile.verified,
        "memory_bytes": profile.memory_bytes,
        "context_bytes": profile.context_bytes,
        "peak_allocated_bytes": found.peak,
        "peak_reserved_bytes": found.replayed.reserved_peak,
        "process_device_bytes": found.process,
        "headroom_bytes": profile.memory_bytes - found.process,
        "fits": held.oom is None,
        "retries": held.retries,
        "peak_phase": worst.peak.phase,
        "breakdown": breakdown | {"other": breakdown["other"] - found.workspace, "workspace": found.workspace},
        "activation_peak_bytes": found.measured[-1].activation_peak,
        "parameters_trainable": found.sizes["parameters_trainable"].value,
        "parameters_total": found.sizes["parameters_total"].value,
        "attention": _kernels(cell, found.attention),
        "predict_s": found.seconds,
        "host_bytes": _host_peak(),
    }


def fit(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The largest shapes of several methods. request: `cells`, one a method, whatever their shapes; `profile`;
    `allocator`; `capacities`, bytes that torch may reserve, in rising order; `batches`, [length, limit] each: the
    largest batch of samples so long; `lengths`, [batch, limit] each; `jobs`, processes at a time.

    The answer has `seconds`, of all of it, and an entry a method: `lines`, each with what was asked and the largest for
    each capacity (0: none), and `refused`, the line of a UserError.
    """
    begin = time.perf_counter()
    gc.collect()
    gc.freeze()  # what was imported is not to be walked at every step of every trace
    # Cards share traces, so few are better off alone; but one costly method is not to keep one process waiting.
    cards = request["capacities"]
    shares = [cards[start : start + CARDS_AT_A_TIME] for start in range(0, len(cards), CARDS_AT_A_TIME)]
    # The last named are commonly the costliest (MEFT, levers): they begin, so that none is alone at the end.
    work = [
        (index, request | {"cell": cell, "capacities": share})
        for index, cell in list(enumerate(request["cells"]))[::-1]
        for share in shares[::-1]
    ]
    # Forked before any backward ran: autograd has no threads yet.
    with ProcessPoolExecutor(request["jobs"], multiprocessing.get_context("fork")) as pool:
        ongoing = {pool.submit(_fit_method, part): (index, part["capacities"][0]) for index, part in work}
        parts: list[dict[int, dict[str, Any]]] = [{} for _ in request["cells"]]
        found: list[dict[str, Any]] = [{}] * len(request["cells"])
        for future in as_completed(ongoing):
            index, first = ongoing[future]
            parts[index][first] = future.result()
            if len(parts[index]) == len(shares):
                entry = found[index] = _joined([parts[index][share[0]] for share in shares])
                said = entry["refused"] or f"{entry['traced']} cells predicted in {entry['seconds']:.0f} s"
                tell(f"{entry['method']}: {said}")
    return {"methods": found, "seconds": time.perf_counter() - begin}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer for one method from those for its cards, a few at a time; times and traces are sums."""
    lines = [
        same[0] | {"largest": [size for line in same for size in line["largest"]]}
        for same in zip(*(part["lines"] for part in parts), strict=True)
    ]
    sums = {name: sum(part[name] for part in parts) for name in ("traced", "seconds", "cpu_s")}
    return parts[0] | {"lines": lines} | sums


def _fit_method(request: dict[str, Any]) -> dict[str, Any]:
    cell, profile = Cell.model_validate(request["cell"]), find_profile(request["profile"])
    begin, cpu = time.perf_counter(), time.process_time()
    shapes = Shapes(cell, profile, AllocatorSettings.parse(request["allocator"]))
    lines: list[dict[str, Any]] = []
    refused = None
    asked: list[tuple[Axis, list[list[int]]]] = [
        ("batch_size", request["batches"]),
        ("sequence_length", request["lengths"]),
    ]
    try:
        longest = _positions(cell) if request["lengths"] else None
        for axis, places in asked:
            for at, limit in places:
                if axis == "sequence_length" and longest is not None:
                    limit = min(limit, longest)
                sizes = largest(shapes.along(axis, at), request["capacities"], limit)
                lines.append({"axis": axis, "at": at, "limit": limit, "largest": sizes})
    except UserError as error:
        refused = str(error)
    took = {"seconds": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    return {"method": cell.method_label, "lines": lines, "refused": refused, "traced": shapes.traced} | took


def _positions(cell: Cell) -> int | None:
    """Longest sequence that a model of the user's own has positions for; None: it is not, or does not say. The parent
    process, which does not import it, cannot know."""
    part = transformers_part(uncomputed_model(cell).model) if is_factory(cell.model) else None
    return None if part is None else positions_in(part.config.to_dict())


def _kernels(cell: Cell, operators: set[str]) -> list[str]:
    """`flash`, `efficient`; `math` where no fused operator ran, and `eager` where none was to."""
    if cell.attention_requested not in ("sdpa", OWN_ATTENTION):
        return ["eager"]
    names = (name.removeprefix("scaled_dot_product_").removesuffix("_attention") for name in operators)
    return sorted(names) or ["math"]


def _host_peak() -> int:
    """The most this process has held, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


Verb = Callable[[dict[str, Any], Tell], dict[str, Any]]
VERBS: dict[str, Verb] = {"estimate": estimate, "fit": fit, "export": export}


def _end_with_who_asked() -> None:
    """Ends this process, and those it has started, when the other end of stdin has gone, however it ended."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Answer the request on stdin. Returns the exit code; anything but a UserError ends in a traceback."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not the answer

    def say(**event: Any) -> None:
        print(json.dumps(event), file=out, flush=True)

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_who_asked, daemon=True).start()
    try:
        say(answer=VERBS[request["verb"]](request, lambda line: say(progress=line)))
    except UserError as error:
        fields = ("where", "what", "cure", "exit_code")
        say(error={name: getattr(error, name) for name in fields})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
