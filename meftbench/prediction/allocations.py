"""Every allocation of one predicted step, in order: to be held against those that torch recorded on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.predict import predict


def allocations(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The allocations of a step. request: `cell`; `profile`, a name; `allocator`, as PYTORCH_ALLOC_CONF has it;
    `versions`, as Versions.parse reads them; `begin`: "model", what is allocated from the model on until the first step
    ends; "first step", which also makes the optimizer's state and the workspaces; "step", a later one.

    The answer has `label`, and of these events: `requested`, bytes of each allocation in order; `origins`, the operator
    of each; `phases`, the phase of each; `peak_above_bytes`, the peak allocated above the level before it;
    `peak_allocated_bytes`.
    """
    cell, profile = Cell.model_validate(request["cell"]), find_profile(request["profile"])
    tell(f"predicting {cell.label} on {profile.device}")
    settings = AllocatorSettings.parse(request["allocator"])
    predicted = predict(cell, profile, settings=settings, versions=Versions.parse(request["versions"]))
    number = len(predicted.starts) - 1 if request["begin"] == "step" else 0
    begin, end = predicted.starts[number], [*predicted.starts, None][number + 1]
    if request["begin"] == "model":
        begin = 0
    requested: list[int] = []
    origins: list[str] = []
    phases: list[str] = []
    phase = ""
    for event in predicted.events[begin:end]:
        if event.kind == "phase":
            phase = event.category
        elif event.kind == "alloc" and event.nbytes:
            requested.append(event.nbytes)
            origins.append(event.origin)
            phases.append(phase)
    step = predicted.replayed.steps[number]
    before = 0 if request["begin"] == "model" else step.baseline.allocated
    return {
        "label": cell.label,
        "device": profile.device,
        "requested": requested,
        "origins": origins,
        "phases": phases,
        "peak_above_bytes": step.peak.allocated - before,
        "peak_allocated_bytes": step.peak.allocated,
    }
