"""The whole question from Python: which method and levers train a model on a card, and what does it cost?

`meftbench plan` prints what `plan_for` returns. Torch is not imported here: the search runs in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.asked import (
    Tell,
    asked_cell,
    bytes_of,
    check_jobs,
    check_names,
    check_room,
    mapping_of,
    nothing,
    silent,
    text_of,
)
from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.profiles import PROFILES, Profile, find_profile
from meftbench.catalogue.validated import about_validation
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.plan.axes import FITTED_OPTIONS
from meftbench.plan.cell import Cell
from meftbench.plan.defaults import PROFILE
from meftbench.plan.models import check_model, known_config
from meftbench.plan.planning import ALL, OPTIMIZER, PLANNED_METHODS, Candidate, candidates, canonical, name_in
from meftbench.plan.prices import price_of
from meftbench.plan.sensible import sensible_length, sensible_precision
from meftbench.report.views.plan_answer import as_plan
from meftbench.runner.kept import ask_kept

if TYPE_CHECKING:
    from pandas import DataFrame

# A card counts as the next larger one from this ratio on: cards of one size differ by a little.
_LARGER = 1.1
_AXES = tuple(name for name in FITTED_OPTIONS if name not in ("precision", "optimizer"))


@dataclass(frozen=True)
class Plan:
    """What fits a card, and what it costs. Sizes are in bytes, and predicted.

    cards: memory of the card asked about, then of the larger ones.  sequence_length: tokens a sample.
    batch_size: samples a step; None: as large as a micro-batch.
    rows: one for each candidate and card: `method` (label with levers), `precision`, `optimizer`, `micro_batch_size`
        (the largest that fits), `process_device_bytes`, `headroom_bytes`, `least_device_bytes` (at micro-batch 1),
        `tokens_per_s` (None: no time can be predicted), `relative_cost` (operations a token over the least of all
        candidates), `recomputed_flops_share`, `host_transfer_bytes`, `fits`, `on_frontier` (no other row is smaller
        and no slower), `cost_per_million_tokens`, `capacity_index` (its card) and more.
    fastest, smallest: the rows to take for speed and for memory; None: nothing fits.  has_time: whether speed was
        compared by predicted time, or else by arithmetic.
    best: of each method that fits, its best row.  larger: what each larger card buys.  too_large: of each method that
        does not fit, what is missing.  levers: what each lever saves, in pairs of rows.
    needs: of each method the smallest shipped card, where it was asked for.  map: memory of the first answer by batch
        and length, where it was asked for.
    refused: why a candidate was not looked at.  candidates, traced: how many were looked at, and shapes traced, in
        `predict_s` seconds.  The other fields are as of meftbench.estimates.Capacity, or as they were given.
    """

    model: str
    model_name: str
    config: dict[str, Any]
    head: str | None
    options: dict[str, Any]
    profile: str
    profile_name: str
    device: str
    verified: bool
    validation: str
    rules: str
    context_bytes: int
    default_profile: bool
    cards: list[int]
    sequence_length: int
    batch_size: int | None
    precisions: list[str]
    optimizer: str
    explained: bool
    source: str
    has_time: bool
    rows: list[dict[str, Any]]
    fastest: dict[str, Any] | None
    smallest: dict[str, Any] | None
    best: list[dict[str, Any]]
    larger: list[dict[str, Any]]
    too_large: list[dict[str, Any]]
    levers: list[dict[str, Any]]
    needs: list[dict[str, Any]]
    map: dict[str, Any] | None
    refused: dict[str, str]
    candidates: int
    traced: int
    predict_s: float

    def to_json(self) -> dict[str, Any]:
        """What `meftbench plan --json` prints."""
        return asdict(self)

    def to_frame(self) -> DataFrame:
        """A table of `rows`, one for each candidate and card."""
        from pandas import DataFrame

        return DataFrame([{"model": self.model, **row, "source": self.source} for row in self.rows])


def plan_for(
    model: str,
    *,
    memory: int | str | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    methods: Sequence[str] | None = None,
    levers: str | Sequence[str] = ALL,
    precision: Sequence[str] | str | None = None,
    optimizer: str | None = None,
    profile: str | Path | None = None,
    larger: Sequence[int | str] | None = None,
    explain: bool = False,
    needs: bool = False,
    shape_map: bool = False,
    prices: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    allocator: str = "",
    for_versions: str = "",
    jobs: int | None = None,
    resume: bool = False,
    allow_code: bool = False,
    tell: Tell | None = None,
    ready: Callable[[], object] = nothing,
    **axes: Any,
) -> Plan:
    """Search methods × levers × precisions × micro-batches for what trains `model` on a card. No GPU is needed.

    The function is not called `plan`, since `meftbench.plan` is a package.

    memory: of the card, in bytes or as text such as "24GiB"; None: that of the profile.
    sequence_length: tokens a sample; None: the model's longest, 2,048 at most.  batch_size: samples a step, which
        micro-batches divide; None: a step is one micro-batch.
    methods: labels as the program prints them; None: all that are worth comparing.  levers: "all", "none", or names.
    precision: one or several; None: bf16 for language models, else fp32.  optimizer: None: adamw, and for full
        fine-tuning also adamw-8bit.
    larger: memory of larger cards, to say what they buy; None: the next that a shipped profile has.
    explain: predict what is missing to say what each lever saves.  needs: say the smallest card of each method.
        shape_map: memory of the first answer by batch and length.  prices: a file (docs/plan.md).
    profile, config, allocator, for_versions, jobs, resume, allow_code, tell, ready: as of meftbench.estimates.fit.
    axes: attention, head, batch.

    Raises UserError: as meftbench.estimates.fit; a price is missing, or the file of prices has a fault.
    """
    check_names("plan", axes, _AXES)
    chosen, allocator = text_of("profile", profile or PROFILE), text_of("allocator", allocator)
    rules = str(Versions.parse(text_of("for_versions", for_versions)))
    device = find_profile(chosen, "plan: profile")
    price = None if prices is None else price_of(Path(prices), device.name)
    cards = _cards(device, memory, larger)
    if jobs is not None:
        check_jobs(jobs)
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise UserError("batch_size", f"{batch_size!r} is no number of samples", "give a whole number from 1")
    overrides = mapping_of("config", config)
    check_model("plan: model", model, overrides)
    length = sequence_length or sensible_length(model, overrides)
    head = axes.get("head") or _head_of(model, overrides)
    language = head in (None, "causal_lm")
    sensible = sensible_precision(model, overrides, head)
    precisions = [precision] if isinstance(precision, str) else list(precision or [sensible])
    wanted = candidates(
        methods=PLANNED_METHODS if methods is None else methods,
        levers=levers,
        precisions=precisions,
        optimizer=optimizer,
        depth=_depth(model, overrides),
        over_vocabulary=language,
        explain=explain,
    )
    given = {name: value for name, value in axes.items() if value is not None}

    def cell_for(candidate: Candidate) -> Cell:
        shape = {"batch_size": 1, "sequence_length": length}
        fields = {"precision": candidate.precision, "optimizer": candidate.optimizer, **given, **shape}
        return asked_cell("plan", model, candidate.label, chosen, overrides, None, allow_code, **fields)

    cells, refused = _cells(wanted, cell_for, methods or ())
    looked_at = {candidate.method for candidate in wanted}
    for method in [name_in(label) for label in methods or PLANNED_METHODS]:
        if method not in looked_at:
            refused[method] = f"none of its lever sets applies in {', '.join(precisions)}"
    request = {
        "cells": [_dumped(candidate, cell) for candidate, cell in cells.items()],
        "profile": chosen,
        "allocator": allocator,
        "versions": for_versions,
        "capacities": [card - device.context_bytes for card in cards],
        "sequence_length": length,
        "batch_size": batch_size,
        "jobs": min(jobs or min(2, os.cpu_count() or 1), len(cells)),
        "needs": needs,
        "map": shape_map,
    }
    ready()
    tell = tell or silent
    tell(f"candidates: {len(cells):,}, of {', '.join(dict.fromkeys(one.method for one in cells))}")
    answer = ask_kept("plan", request, tell, allow_code, resume)
    refused |= answer["refused"]
    if not answer["rows"]:
        what, _, cure = next(iter(refused.values()), "nothing could be predicted").rpartition("; ")
        raise UserError("", what or "nothing could be predicted", cure or "name other methods")
    options = dict(given) | ({"allocator": allocator} if allocator else {})
    options |= ({"for-versions": for_versions} if for_versions else {}) | ({"allow-code": True} if allow_code else {})
    about: dict[str, Any] = {"model": next(iter(cells.values())).model_label, "model_name": model, "config": overrides}
    about |= {"head": head, "options": options, "profile": device.name, "profile_name": chosen}
    about |= {"device": device.device, "verified": device.verified, "validation": about_validation(device)}
    about |= {"rules": rules, "context_bytes": device.context_bytes, "default_profile": profile is None}
    about |= {"cards": cards, "sequence_length": length, "batch_size": batch_size, "precisions": precisions}
    about |= {"optimizer": optimizer or OPTIMIZER, "explained": explain, "map": answer.get("map"), "refused": refused}
    about |= {"candidates": len(cells), "traced": answer["traced"], "predict_s": answer["seconds"]}
    explained = [candidate for candidate in cells if candidate.explain]
    return Plan(**as_plan(about, answer["rows"], explained, price, needs))


def _cards(device: Profile, memory: int | str | None, larger: Sequence[int | str] | None) -> list[int]:
    """Memory of the card that is asked about, and then of larger ones. Raises UserError: one is no size, or smaller."""
    own = device.memory_bytes if memory is None else bytes_of(memory)
    check_room(own, device)
    if larger is None:
        sizes = [profile.memory_bytes for profile in PROFILES.values() if profile.memory_bytes >= _LARGER * own]
        return [own, *sorted(sizes)[:1]]
    others = sorted({bytes_of(size) for size in larger})
    if others and others[0] <= own:
        raise UserError("next", "a next card has no more memory than the one asked about", "name larger ones")
    return [own, *others]


def _head_of(model: str, overrides: dict[str, Any]) -> str | None:
    """The head that the model is given where none is named; None: its type is not known."""
    kind = (known_config(model, overrides) or {}).get("model_type")
    return BACKBONES[kind].heads[0] if kind in BACKBONES else None


def _depth(model: str, overrides: dict[str, Any]) -> int | None:
    """The number of layers; None: not known, as of a model on the hub."""
    depth = (known_config(model, overrides) or {}).get("num_hidden_layers")
    return depth if isinstance(depth, int) else None


def _cells(
    wanted: Sequence[Candidate], cell_for: Callable[[Candidate], Cell], typed: Sequence[str]
) -> tuple[dict[Candidate, Cell], dict[str, str]]:
    """The cell of each candidate; and by label why others have none.

    Raises UserError: a label that the user typed is refused in every precision, or all are.
    """
    cells: dict[Candidate, Cell] = {}
    errors: dict[str, UserError] = {}
    for candidate in wanted:
        try:
            cells[candidate] = cell_for(candidate)
        except UserError as error:
            errors.setdefault(candidate.label, error)
    known = {candidate.label for candidate in cells}
    for label in map(canonical, typed):
        if label in errors and label not in known:
            raise errors[label]
    if not cells:
        raise next(iter(errors.values()))
    return cells, {label: f"{error.what}; {error.cure}" for label, error in errors.items()}


def _dumped(candidate: Candidate, cell: Cell) -> dict[str, Any]:
    return cell.model_dump(mode="json") | ({"explain": True} if candidate.explain else {})
