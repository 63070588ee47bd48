"""What fits a card: of many methods with levers the largest micro-batch, its memory, and the time of its step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.catalogue.profiles import Profile, find_profile
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.models import max_positions
from meftbench.plan.optimizing import IN_BACKWARD
from meftbench.plan.ranking import fastest_first
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.estimate import time_of
from meftbench.prediction.interpolated import Interpolated
from meftbench.prediction.largest import Shape, Shapes, largest
from meftbench.prediction.pool import Kept, Pool, Task
from meftbench.prediction.predict import Predicted
from meftbench.prediction.tracer import Tracer
from meftbench.units import format_bytes

MOST_TOKENS = 2**14  # of a micro-batch that is tried: a larger one computes no faster to speak of
MOST_MAPPED = 2**22  # tokens of a shape in a map
MAPPED = 8  # sizes on each axis of a map
BANDS = 6  # of shapes of several samples, in a map: so that processes end at about the same time
_SHORTEST = 64  # tokens: no shorter samples are mapped


def plan(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Of each candidate and card the largest micro-batch that fits, with its memory and time.

    request: `cells`, the candidates, whatever their shapes, of which those with the key `explain` are no answers by
    themselves; `profile`, a name; `allocator`, as PYTORCH_ALLOC_CONF has it; `versions`, as Versions.parse reads them;
    `capacities`, bytes that torch may reserve on each card, in rising order; `sequence_length`, tokens a sample;
    `batch_size`, samples a step, or None: a step is one micro-batch; `map`, whether the first answer's memory is wanted
    for other shapes; `jobs`, processes at a time; `kept`, a file of results that was begun before, or None.

    The answer has `seconds`, of the search; `traced`, how many cells were traced; `rows`, of each candidate one for
    each card (docs/plan.md); `refused`, the text of a UserError by label; `map`, or None. What is to be taken first was
    traced again layer by layer, on both sides of the boundary (`verified`).
    """
    begin = time.perf_counter()
    cells = [dict(cell) for cell in request["cells"]]
    only_explains = [bool(cell.pop("explain", False)) for cell in cells]
    shared = {key: request[key] for key in ("profile", "allocator", "versions", "capacities", "sequence_length")}
    shared |= {"batch_size": request["batch_size"], "directly": False}
    tasks = [shared | {"cell": cell} for cell in cells]
    entries: list[dict[str, Any]] = [{} for _ in tasks]
    groups = _grouped(cells)
    done = 0
    with Pool(request["jobs"], Kept(request.get("kept"))) as pool:
        of_groups = [shared | {"cells": [cells[index] for index in group]} for group in groups]
        for place, results in pool.results(candidates_of, of_groups):
            for index, entry in zip(groups[place], results, strict=True):
                entries[index] = entry
                done += 1
                tell(f"{done:>3} of {len(tasks)}  {_told(entry)}")
        tell("tracing the answers layer by layer")
        verified = _verify(pool, tasks, entries, only_explains)
        shape_map = _mapped(pool, tasks, entries, only_explains) if request.get("map") else None
    rows = [row for entry in entries for row in entry["rows"]]
    cheapest = min((row["flops_per_token"] for row in rows), default=1.0)
    for row in rows:
        row["relative_cost"] = row.pop("flops_per_token") / cheapest
    return {
        "seconds": time.perf_counter() - begin,
        "traced": sum(entry["traced"] for entry in entries) + verified,
        "rows": rows,
        "refused": {entry["method"]: entry["refused"] for entry in entries if entry["refused"]},
        "map": shape_map,
    }


def _grouped(cells: list[dict[str, Any]]) -> list[list[int]]:
    """Numbers of the candidates in groups that one process predicts, since they differ only in how many layers are
    reversed or checkpointed: what is traced for one is of use for the others. The largest groups begin, and then the
    methods named last, which are commonly the costliest, so that none of them runs alone at the end."""
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        counts = {"reversible_layers", "layers"}
        method_params = {key: value for key, value in cell["method_params"].items() if key not in counts}
        checkpoint = {
            key: value for key, value in cell["lever_params"].get("checkpoint", {}).items() if key not in counts
        }
        key = cell | {"method_params": method_params, "lever_params": cell["lever_params"] | {"checkpoint": checkpoint}}
        has_count = bool(counts & {*cell["method_params"], *cell["lever_params"].get("checkpoint", {})})
        groups.setdefault(json.dumps([has_count, key], sort_keys=True), []).append(index)
    return sorted(groups.values(), key=lambda group: (-len(group), -group[0]))


def _told(entry: dict[str, Any]) -> str:
    """A candidate's result as a line of progress."""
    if entry["refused"]:
        return f"{entry['method']}: {entry['refused']}"
    row = entry["rows"][0]
    size = format_bytes(row["process_device_bytes"])
    what = f"micro-batch {row['micro_batch_size']}" if row["fitted"] else "does not fit: micro-batch 1"
    speed = "" if row["tokens_per_s"] is None else f", {row['tokens_per_s']:,.0f} tokens/s"
    return f"{entry['method']}, {row['precision']}: {what}, {size}{speed}, predicted"


# --- one candidate, in a process of the pool ---


def candidates_of(task: Task) -> list[dict[str, Any]]:
    """The rows of the candidates of one group. task: as of `candidate`, with `cells` in place of `cell`."""
    tracer = Tracer(find_profile(task["profile"]), Versions.parse(task["versions"]))
    return [candidate({**task, "cell": cell}, tracer) for cell in task["cells"]]


def candidate(task: Task, tracer: Tracer | None = None) -> dict[str, Any]:
    """The rows of one candidate, a row for each card. task: as the request, with `cell`; `directly`, whether every
    layer is traced.  tracer: which has traced others of its group."""
    cell, shapes, profile = _shapes_of(task, tracer)
    try:
        rows = _rows(cell, shapes, profile, task)
    except UserError as error:
        return {"method": cell.method_label, "rows": [], "refused": str(error), "traced": shapes.traced}
    return {"method": cell.method_label, "rows": rows, "refused": None, "traced": shapes.traced}


def _shapes_of(task: Task, tracer: Tracer | None = None) -> tuple[Cell, Shapes, Profile]:
    cell, profile = Cell.model_validate(task["cell"]), find_profile(task["profile"])
    settings, versions = AllocatorSettings.parse(task["allocator"]), Versions.parse(task["versions"])
    tracer = tracer or Tracer(profile, versions, extrapolate=not task["directly"])
    return cell, Shapes(cell, profile, settings, versions, tracer), profile


def _sizes_of(cell: Cell, task: Task) -> list[int] | None:
    """The micro-batches into which the batch can be divided, in rising order; None: any."""
    batch = task["batch_size"]
    if batch is None:
        return None
    if IN_BACKWARD in cell.levers.names():  # gradients are not summed over micro-batches
        return [batch]
    return [size for size in range(1, batch + 1) if batch % size == 0]


def _rows(cell: Cell, shapes: Shapes, profile: Profile, task: Task) -> list[dict[str, Any]]:
    length, batch = task["sequence_length"], task["batch_size"]
    sizes = _sizes_of(cell, task)

    def shape_of(micro: int) -> Shape:
        return shapes.at(batch or micro, length, micro)

    if sizes is None:
        limit = max(1, MOST_TOKENS // length)
        found = largest(shape_of, task["capacities"], limit, (1, min(4, limit)))
    else:
        places = largest(lambda place: shape_of(sizes[place - 1]), task["capacities"], len(sizes))
        found = [sizes[place - 1] if place else 0 for place in places]
    least = shape_of(1 if sizes is None else sizes[0])
    rows = []
    for index, (micro, capacity) in enumerate(zip(found, task["capacities"], strict=True)):
        shape = shape_of(micro) if micro else least
        row = {"micro_batch_size": micro or (1 if sizes is None else sizes[0]), "capacity_index": index}
        row |= {"sequence_length": length, "smallest_reserved_bytes": least.needed, "fitted": bool(micro)}
        rows.append(_row(cell, shape, profile, capacity if micro else None) | row)
    return rows


def _row(cell: Cell, shape: Shape, profile: Profile, capacity: int | None) -> dict[str, Any]:
    """Memory and time of a shape. capacity: bytes that torch may reserve; None: any number."""
    predicted = shape.predicted
    on_card = predicted.replayed if capacity is None or shape.needed <= capacity else shape.on_card(capacity)
    metrics = predicted.metrics()
    cost = time_of(predicted.work, profile.speeds, predicted.tokens)
    return {
        "method": cell.method_label,
        "parts": [part.recorded() for part in cell.parts],
        "precision": cell.precision,
        "optimizer": cell.optimizer,
        "peak_allocated_bytes": on_card.allocated_peak,
        "peak_reserved_bytes": on_card.reserved_peak,
        "process_device_bytes": on_card.reserved_peak + profile.context_bytes,
        "breakdown": {name.removesuffix("_bytes"): metrics[name].value for name in BREAKDOWN},
        "parameters_trainable": metrics["parameters_trainable"].value,
        "step_s": cost["step_s"],
        "tokens_per_s": cost["tokens_per_s"],
        "recomputed_flops_share": cost["recomputed_flops_share"],
        "host_transfer_bytes": cost["host_transfer_bytes"],
        "flops_per_token": cost["flops"] / predicted.tokens,
        "retries": on_card.retries,
        "verified": False,
    }


# --- what is to be taken first, traced layer by layer ---


def _verify(pool: Pool, tasks: list[Task], entries: list[dict[str, Any]], only_explains: list[bool]) -> int:
    """Trace what is to be taken first on each card layer by layer, and the smallest, until all of them were.

    A candidate whose rows differ then gets those of the direct traces. Returns how many cells were traced for it.
    """
    traced = 0
    while wanted := _first_answers(entries, only_explains):
        again = [tasks[number] | {"directly": True, "boundaries": _boundaries(entries[number])} for number in wanted]
        for place, result in pool.results(boundaries_of, again):
            entry = entries[wanted[place]]
            traced += result["traced"]
            if not result["alike"]:
                entry["rows"] = candidate(tasks[wanted[place]] | {"directly": True})["rows"]
            for row in entry["rows"]:
                row["verified"] = True
    return traced


def _first_answers(entries: list[dict[str, Any]], only_explains: list[bool]) -> list[int]:
    """Numbers of the candidates that are to be taken first, or are the smallest, on a card, and are not verified."""
    rows = _fitting(entries, only_explains)
    numbers = set()
    for index in {row["capacity_index"] for row in rows}:
        of_card = [row for row in rows if row["capacity_index"] == index]
        firsts = [fastest_first(of_card)[0], min(of_card, key=lambda row: row["smallest_reserved_bytes"])]
        numbers |= {row["number"] for row in firsts if not row["verified"]}
    return sorted(numbers)


def _fitting(entries: list[dict[str, Any]], only_explains: list[bool]) -> list[dict[str, Any]]:
    """The rows that fit, and may be the answer, each with the `number` of its candidate and a cost to compare it by."""
    return [
        row | {"number": number, "relative_cost": row["flops_per_token"]}
        for number, entry in enumerate(entries)
        if not only_explains[number]
        for row in entry["rows"]
        if row["fitted"]
    ]


def _boundaries(entry: dict[str, Any]) -> list[list[Any]]:
    return [[row["micro_batch_size"], row["fitted"], row["peak_reserved_bytes"]] for row in entry["rows"]]


def boundaries_of(task: Task) -> dict[str, Any]:
    """Whether each card's boundary is where it was told: `boundaries` of a candidate, with micro-batch, whether that
    fits, and the bytes that torch reserves. The next larger micro-batch must not fit."""
    cell, shapes, _ = _shapes_of(task)
    sizes = _sizes_of(cell, task)
    alike = True
    for (micro, fits, reserved), capacity in zip(task["boundaries"], task["capacities"], strict=True):
        shape = shapes.at(task["batch_size"] or micro, task["sequence_length"], micro)
        on_card = shape.on_card(capacity)
        alike &= (on_card.oom is None) == fits and (not fits or on_card.reserved_peak == reserved)
        larger = [micro + 1] if sizes is None else [size for size in sizes if size > micro][:1]
        if fits and larger:
            alike &= not shapes.at(task["batch_size"] or larger[0], task["sequence_length"], larger[0]).fits(capacity)
    return {"alike": alike, "traced": shapes.traced}


# --- memory by batch and length ---


def _mapped(
    pool: Pool, tasks: list[Task], entries: list[dict[str, Any]], only_explains: list[bool]
) -> dict[str, Any] | None:
    """The memory of the first answer by batch and length; None: nothing fits."""
    rows = [row for row in _fitting(entries, only_explains) if row["capacity_index"] == 0]
    if not rows:
        return None
    task = tasks[fastest_first(rows)[0]["number"]]
    cell = Cell.model_validate(task["cell"])
    lengths = _lengths(task["sequence_length"], max_positions(cell.model, cell.model_config_overrides))
    batches = [2**power for power in range(MAPPED)]
    bands = _bands([(batch, length) for batch in batches for length in lengths if batch * length <= MOST_MAPPED])
    known: dict[tuple[int, int], int] = {}
    for place, sizes in pool.results(band_of_map, [task | {"shapes": band} for band in bands]):
        known |= zip(bands[place], sizes, strict=True)
    table = [[known.get((batch, length)) for length in lengths] for batch in batches]
    return {"method": cell.method_label, "batch_sizes": batches, "lengths": lengths, "process_device_bytes": table}


def _bands(shapes: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Shapes in bands, for one process each, those with the most tokens first, as they take longest. Shapes that are
    likely to be told from the same ones are in one band: those with as many tokens, and those of one sample."""
    single = [shape for shape in shapes if shape[0] == 1]
    rest = sorted((shape for shape in shapes if shape[0] > 1), key=lambda shape: -shape[0] * shape[1])
    bands: list[list[tuple[int, int]]] = []
    for _, alike in groupby(rest, key=lambda shape: shape[0] * shape[1]):
        if not bands or len(bands[-1]) * BANDS >= len(rest):
            bands.append([])
        bands[-1] += alike
    return [band for band in [*bands, single] if band]


def _lengths(length: int, longest: int | None) -> list[int]:
    """About `MAPPED` lengths around one, each twice the one before, up to the model's longest."""
    shortest = length
    while shortest > _SHORTEST and shortest % 2 == 0 and length // shortest < 2 ** (MAPPED // 2):
        shortest //= 2
    lengths = [shortest * 2**power for power in range(MAPPED)]
    return [each for each in lengths if longest is None or each <= longest] or [length]


def band_of_map(task: Task) -> list[int]:
    """Bytes of the process for each of `shapes`, pairs of a batch size, in one micro-batch, and a length."""
    cell, profile = Cell.model_validate(task["cell"]), find_profile(task["profile"])
    tracer = _tracer_of_map(task["profile"], task["versions"])
    interpolated = Interpolated(tracer, cell, task["shapes"])
    unlimited = replace(AllocatorSettings.parse(task["allocator"]), capacity=None)
    predicted = (Predicted(profile, interpolated.at(*shape), unlimited) for shape in task["shapes"])
    return [each.replayed.reserved_peak + profile.context_bytes for each in predicted]


@lru_cache(maxsize=1)
def _tracer_of_map(profile: str, versions: str) -> Tracer:
    """The tracer of this process, which is kept from one band to the next."""
    return Tracer(find_profile(profile), Versions.parse(versions))
