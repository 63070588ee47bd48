"""One predicted step over time: live bytes by category, and the memory snapshot that torch's viewer opens."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings, Event, snapshot
from meftbench.prediction.predict import predict
from meftbench.probes.memory_counted import BLOCK, CATEGORIES

POINTS = 600  # more are not seen


def export(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """request: `cells`; `profile`; `allocator`, as PYTORCH_ALLOC_CONF has it; `snapshot`, a file to write of the first
    cell, or None.

    The answer is the last step of each of `cells`: `timeline` (see `timeline_of`), `label`, `method`, `device`,
    `peak_allocated_bytes`.
    """
    profile, settings = find_profile(request["profile"]), AllocatorSettings.parse(request["allocator"])
    answers: list[dict[str, Any]] = []
    for cell in map(Cell.model_validate, request["cells"]):
        tell(f"predicting {cell.label} on {profile.device}")
        found = predict(cell, profile, settings=settings)
        if request["snapshot"] and not answers:
            _write(Path(request["snapshot"]), pickle.dumps(snapshot(found.events, settings)))
        answers.append(
            {
                "label": cell.label,
                "method": cell.method_label,
                "device": profile.device,
                "peak_allocated_bytes": found.measured[-1].peak.total,
                "timeline": timeline_of(found.events, found.step_from),
            }
        )
    return {"cells": answers}


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        cure = "choose another with -o/--output"
        raise UserError(str(file), f"cannot be written ({error.strerror})", cure) from None


def timeline_of(events: list[Event], step_from: int, points: int = POINTS) -> dict[str, Any]:
    """Of the step that begins with event `step_from`: `at`, numbers of events; `levels`, for each category the live
    bytes in blocks of 512 there; `phases`, [name, number of its first event].

    Of more events than `points` the fullest of each stretch are taken, so that no peak is lost.
    """
    kinds = _kinds(events)
    live = dict.fromkeys(CATEGORIES, 0)
    held: dict[int, tuple[str, int]] = {}
    taken: list[tuple[int, int, dict[str, int]]] = []
    phases: list[tuple[str, int]] = []
    stretch = max(1, -(-(len(events) - step_from) // points))
    for number, event in enumerate(events):
        if event.kind == "alloc":
            size = -(-event.nbytes // BLOCK) * BLOCK
            held[event.key] = (kinds[number], size)
            live[kinds[number]] += size
        elif event.kind == "free":
            kind, size = held.pop(event.key)
            live[kind] -= size
        if number < step_from:
            continue
        place = number - step_from
        if event.kind == "phase" and (not phases or phases[-1][0] != event.category):  # it may be told again
            phases.append((event.category, place))
        total = sum(live.values())
        if not taken or place // stretch > taken[-1][0] // stretch:
            taken.append((place, total, dict(live)))
        elif total > taken[-1][1]:
            taken[-1] = (place, total, dict(live))
    levels = {kind: [level[kind] for _, _, level in taken] for kind in CATEGORIES}
    return {"at": [place for place, _, _ in taken], "levels": levels, "phases": phases}


def _kinds(events: list[Event]) -> dict[int, str]:
    """The category of each allocation, by its number. An event has that of its birth; what backward made and is there
    when the optimizer begins is a gradient, what the optimizer made and is there at the end is its state."""
    kinds: dict[int, str] = {}
    born: dict[int, tuple[int, str]] = {}
    phase = "load"
    becomes = {"optimizer": ("backward", "gradients"), "end": ("optimizer", "optimizer")}
    for number, event in enumerate(events):
        if event.kind == "phase":
            phase = event.category
            of, kind = becomes.get(phase, ("", ""))
            for birth, when in born.values():
                if when == of and kinds[birth] == "temporaries":
                    kinds[birth] = kind
        elif event.kind == "alloc":
            born[event.key] = (number, phase)
            kinds[number] = event.category
        else:
            born.pop(event.key)
    return kinds
