"""Which shapes fit GPUs: the largest batch and the longest sequence of several methods, found by parallel processes."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from meftbench.prediction.pool import Kept, Pool
from meftbench.prediction.trace import uncomputed_model

FIRST = (2048, 8192)  # tokens of the shapes that are predicted first


def fit(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The largest shapes of several methods. request: `cells`, one for each method, whatever their shapes; `profile`, a
    name; `allocator`, as PYTORCH_ALLOC_CONF has it; `versions`, as Versions.parse reads them; `capacities`, bytes that
    torch may reserve, in rising order; `batches`, pairs [length, limit]: the largest batch of samples of that length is
    found, up to the limit; `lengths`, pairs [batch, limit]: the longest sequence in a batch of that size; `jobs`,
    processes at a time; `kept`, a file of results that was begun before, or None.

    The answer has `seconds`, of the whole search, and `methods`, an entry for each: `lines`, each with what was asked
    and the largest size for each capacity (0: none fits), and `refused`, the text of a UserError, or None.
    """
    begin = time.perf_counter()
    shared = {key: value for key, value in request.items() if key not in ("cells", "jobs", "kept")}
    # The methods named last are commonly the costliest (MEFT, memory optimisations): they begin, so that none of them
    # runs alone at the end.
    tasks = [shared | {"cell": cell} for cell in request["cells"]][::-1]
    answers: list[dict[str, Any]] = [{}] * len(tasks)
    with Pool(request["jobs"], Kept(request.get("kept"))) as pool:
        for number, entry in pool.results(_fit_method, tasks):
            answers[len(tasks) - 1 - number] = entry
            tell(_told(entry))
    return {"methods": answers, "seconds": time.perf_counter() - begin}


def _told(entry: dict[str, Any]) -> str:
    """A method's result as a line of progress: for each question the largest sizes, by card."""
    if entry["refused"]:
        return f"{entry['method']}: {entry['refused']}"
    found = [
        f"{', '.join(f'{size:,}' for size in line['largest'])} "
        + (
            f"samples of {line['at']:,} tokens"
            if line["axis"] == "batch_size"
            else f"tokens at a batch of {line['at']}"
        )
        for line in entry["lines"]
    ]
    return f"{entry['method']}: {'; '.join(found)}, predicted in {entry['seconds']:.0f} s"


def _fit_method(request: dict[str, Any]) -> dict[str, Any]:
    """The answer for one method (`cell`), in a process of the pool."""
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
                first = sorted({min(limit, max(1, tokens // at)) for tokens in FIRST})
                sizes = largest(shapes.along(axis, at), request["capacities"], limit, first)
                lines.append({"axis": axis, "at": at, "limit": limit, "largest": sizes})
    except UserError as error:
        refused = str(error)
    times = {"seconds": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu_begin}
    parts = [part.recorded() for part in cell.parts]
    answer = {"method": cell.method_label, "parts": parts, "lines": lines, "refused": refused, "traced": shapes.traced}
    return answer | times


def _positions(cell: Cell) -> int | None:
    """Longest sequence that the user's own model has positions for; None: it is not the user's own, or does not say.
    The parent process cannot know, since it does not import the user's code."""
    part = transformers_part(uncomputed_model(cell).model) if is_factory(cell.model) else None
    return None if part is None else positions_in(part.config.to_dict())
