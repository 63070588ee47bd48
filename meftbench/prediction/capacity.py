"""Which shapes fit GPUs: the largest batch and the longest sequence of several methods, found by parallel processes."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from meftbench.backbones.own import transformers_part
from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import is_factory
from meftbench.plan.models import positions_in
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.largest import Axis, Shapes, largest
from meftbench.prediction.trace import uncomputed_model

CARDS_AT_A_TIME = 2


def fit(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The largest shapes of several methods. request: `cells`, one for each method, whatever their shapes; `profile`, a
    name; `allocator`, as PYTORCH_ALLOC_CONF has it; `versions`, as Versions.parse reads them; `capacities`, bytes that
    torch may reserve, in rising order; `batches`, pairs [length, limit]: the largest batch of samples of that length is
    found, up to the limit; `lengths`, pairs [batch, limit]: the longest sequence in a batch of that size; `jobs`,
    processes at a time.

    The answer has `seconds`, of the whole search, and `methods`, an entry for each: `lines`, each with what was asked
    and the largest size for each capacity (0: none fits), and `refused`, the text of a UserError, or None.
    """
    begin = time.perf_counter()
    gc.collect()
    gc.freeze()  # so that no collection in a trace goes through what was imported
    # Cards share the traces of a process, so few groups cost least; but one costly method must not keep one process
    # busy while the others are idle.
    capacities = request["capacities"]
    shares = [capacities[start : start + CARDS_AT_A_TIME] for start in range(0, len(capacities), CARDS_AT_A_TIME)]
    # The methods named last are commonly the costliest (MEFT, memory optimisations): they begin, so that none of them
    # runs alone at the end.
    tasks = [
        (index, request | {"cell": cell, "capacities": share})
        for index, cell in list(enumerate(request["cells"]))[::-1]
        for share in shares[::-1]
    ]
    # Forked before any backward pass ran, so that autograd has no threads yet.
    with ProcessPoolExecutor(request["jobs"], multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(_fit_method, part): (index, part["capacities"][0]) for index, part in tasks}
        parts: list[dict[int, dict[str, Any]]] = [{} for _ in request["cells"]]
        answers: list[dict[str, Any]] = [{}] * len(request["cells"])
        for future in as_completed(futures):
            index, first = futures[future]
            parts[index][first] = future.result()
            if len(parts[index]) == len(shares):
                entry = answers[index] = _joined([parts[index][share[0]] for share in shares])
                summary = entry["refused"] or f"{entry['traced']} cells predicted in {entry['seconds']:.0f} s"
                tell(f"{entry['method']}: {summary}")
    return {"methods": answers, "seconds": time.perf_counter() - begin}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer for one method from those for its groups of cards; times and numbers of traces are added up."""
    lines = [
        same_line[0] | {"largest": [size for line in same_line for size in line["largest"]]}
        for same_line in zip(*(part["lines"] for part in parts), strict=True)
    ]
    sums = {name: sum(part[name] for part in parts) for name in ("traced", "seconds", "cpu_s")}
    return parts[0] | {"lines": lines} | sums


def _fit_method(request: dict[str, Any]) -> dict[str, Any]:
    """The answer for one method (`cell`) and a group of `capacities`, in a process of the pool."""
    cell, profile = Cell.model_validate(request["cell"]), find_profile(request["profile"])
    begin, cpu_begin = time.perf_counter(), time.process_time()
    shapes = Shapes(cell, profile, AllocatorSettings.parse(request["allocator"]), Versions.parse(request["versions"]))
    lines: list[dict[str, Any]] = []
    refused = None
    searches: list[tuple[Axis, list[list[int]]]] = [
        ("batch_size", request["batches"]),
        ("sequence_length", request["lengths"]),
    ]
    try:
        longest = _positions(cell) if request["lengths"] else None
        for axis, points in searches:
            for at, limit in points:
                if axis == "sequence_length" and longest is not None:
                    limit = min(limit, longest)
                sizes = largest(shapes.along(axis, at), request["capacities"], limit)
                lines.append({"axis": axis, "at": at, "limit": limit, "largest": sizes})
    except UserError as error:
        refused = str(error)
    times = {"seconds": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu_begin}
    return {"method": cell.method_label, "lines": lines, "refused": refused, "traced": shapes.traced} | times


def _positions(cell: Cell) -> int | None:
    """Longest sequence that the user's own model has positions for; None: it is not the user's own, or does not say.
    The parent process cannot know, since it does not import the user's code."""
    part = transformers_part(uncomputed_model(cell).model) if is_factory(cell.model) else None
    return None if part is None else positions_in(part.config.to_dict())
