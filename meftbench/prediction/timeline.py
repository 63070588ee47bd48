"""One predicted step over time: live bytes by category, and a memory snapshot for torch's viewer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings, Event, snapshot
from meftbench.prediction.predict import predict
from meftbench.probes.storage_counter import BLOCK, CATEGORIES
from meftbench.records.store import write_named

POINTS = 600  # a chart could not show more


def export(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Predict cells over time. request: `cells`; `profile`, a name; `allocator`, as PYTORCH_ALLOC_CONF has it;
    `versions`, as Versions.parse reads them; `snapshot`, a file to which that of the first cell is written, or None.

    The answer has, for the last step of each of `cells`: `timeline` (see `timeline_of`), `label`, `method`, `device`,
    `peak_allocated_bytes`.
    """
    profile, settings = find_profile(request["profile"]), AllocatorSettings.parse(request["allocator"])
    answers: list[dict[str, Any]] = []
    for cell in map(Cell.model_validate, request["cells"]):
        tell(f"predicting {cell.label} on {profile.device}")
        predicted = predict(cell, profile, settings=settings, versions=Versions.parse(request["versions"]))
        if request["snapshot"] and not answers:
            _write(Path(request["snapshot"]), pickle.dumps(snapshot(predicted.events, settings)))
        answers.append(
            {
                "label": cell.label,
                "method": cell.method_label,
                "device": profile.device,
                "peak_allocated_bytes": predicted.measured[-1].peak.total,
                "timeline": timeline_of(predicted.events, predicted.step_from),
            }
        )
    return {"cells": answers}


def _write(file: Path, content: bytes) -> None:
    try:
        write_named(file, content)
    except OSError as error:
        cure = "choose another with -o/--output"
        raise UserError(str(file), f"cannot be written ({error.strerror})", cure) from None


def timeline_of(events: list[Event], step_from: int, points: int = POINTS) -> dict[str, Any]:
    """Of the step that begins with event `step_from`: `at`, numbers of its events, from 0; `levels`, for each category
    the live bytes after each of those events, in blocks of 512; `phases`, pairs (name, number of its first event).

    If there are more events than `points`, that with the most live bytes in each stretch is taken: no peak is lost.
    """
    kinds = _kinds(events)
    live = dict.fromkeys(CATEGORIES, 0)
    storages: dict[int, tuple[str, int]] = {}
    samples: list[tuple[int, int, dict[str, int]]] = []
    phases: list[tuple[str, int]] = []
    stretch = max(1, -(-(len(events) - step_from) // points))
    for number, event in enumerate(events):
        if event.kind == "alloc":
            size = -(-event.nbytes // BLOCK) * BLOCK
            storages[event.key] = (kinds[number], size)
            live[kinds[number]] += size
        elif event.kind == "free":
            kind, size = storages.pop(event.key)
            live[kind] -= size
        if number < step_from:
            continue
        position = number - step_from
        if event.kind == "phase" and (not phases or phases[-1][0] != event.category):  # a phase may be marked twice
            phases.append((event.category, position))
        total = sum(live.values())
        if not samples or position // stretch > samples[-1][0] // stretch:
            samples.append((position, total, dict(live)))
        elif total > samples[-1][1]:
            samples[-1] = (position, total, dict(live))
    levels = {kind: [level[kind] for _, _, level in samples] for kind in CATEGORIES}
    return {"at": [position for position, _, _ in samples], "levels": levels, "phases": phases}


def _kinds(events: list[Event]) -> dict[int, str]:
    """The category of each allocation, by the number of its event. The event has the category at the allocation. But
    temporaries of the backward pass that are alive when the optimizer begins are gradients, and those of the optimizer
    that are alive at the end of the step are its state."""
    kinds: dict[int, str] = {}
    born: dict[int, tuple[int, str]] = {}
    phase = "load"
    becomes = {"optimizer": ("backward", "gradients"), "end": ("optimizer", "optimizer")}
    for number, event in enumerate(events):
        if event.kind == "phase":
            phase = event.category
            birth_phase, kind = becomes.get(phase, ("", ""))
            for birth, phase_of_storage in born.values():
                if phase_of_storage == birth_phase and kinds[birth] == "temporaries":
                    kinds[birth] = kind
        elif event.kind == "alloc":
            born[event.key] = (number, phase)
            kinds[number] = event.category if event.category in CATEGORIES else "other"
        else:
            born.pop(event.key)
    return kinds
