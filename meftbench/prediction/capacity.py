"""Which shapes fit cards: the largest batch and the longest sequence of several methods, a process for each."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from meftbench.backbones.own import transformers_part
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import is_factory
from meftbench.plan.models import positions_in
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.largest import Axis, Shapes, largest
from meftbench.prediction.trace import uncomputed_model

CARDS_AT_A_TIME = 2


def fit(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
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
