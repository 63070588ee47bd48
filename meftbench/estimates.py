"""Predictions from Python: the memory of one cell, and what fits a card, on a GPU that need not be there.

`meftbench estimate` and `meftbench fit` print what these functions return. Torch is not imported here: a prediction
runs in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.catalogue.profiles import PREDICTED, Profile, find_profile
from meftbench.errors import UserError, unknown
from meftbench.plan.axes import FITTED_OPTIONS, PREDICTED_OPTIONS
from meftbench.plan.cell import Cell
from meftbench.plan.defaults import FITTED_LENGTHS, FITTED_METHODS, PROFILE
from meftbench.plan.factories import check_allowed, places_of
from meftbench.plan.models import check_model, image_tokens, known_config, max_positions
from meftbench.plan.point import cell_of
from meftbench.report.fit import as_answer
from meftbench.runner.predictions import ask
from meftbench.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

# Beyond these nothing is looked at; where a card has room for them, that is said.
MOST_TOKENS = 2**24
MOST_SAMPLES = 2**16
MOST_ASKED = 2**40  # tokens of a step

Tell = Callable[[str], None]


def _silent(line: str) -> None:
    """No progress."""


def _nothing() -> None:
    """Nothing to be done."""


@dataclass(frozen=True)
class Estimate:
    """The predicted memory of one training step; sizes in bytes, all of them predicted but for counts of parameters.

    memory_bytes: of the device, of which a process without tensors takes `context_bytes`.
    peak_allocated_bytes: the largest sum of live blocks, which `breakdown` adds up to, in phase `peak_phase`;
        peak_reserved_bytes: of segments that torch's allocator takes; process_device_bytes: with the context.
    headroom_bytes: what the device has left.  fits: whether the step gets by on it, `retries`: how often torch must
        give back for that what it has cached.
    activation_peak_bytes: peak of forward and backward above the level before the step.
    attention: kernels that run.  predict_s: seconds that the prediction took.  host_bytes: memory that it
        took on this machine.
    verified: whether predictions were held against this device.
    """

    label: str
    profile: str
    device: str
    verified: bool
    memory_bytes: int
    context_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    process_device_bytes: int
    headroom_bytes: int
    fits: bool
    retries: int
    peak_phase: str
    breakdown: dict[str, int]
    activation_peak_bytes: int
    parameters_trainable: int
    parameters_total: int
    attention: list[str]
    predict_s: float
    host_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What `meftbench estimate --json` prints."""
        return asdict(self)

    def to_frame(self) -> DataFrame:
        """One row; the parts of the breakdown are columns, `breakdown_parameters` and so on."""
        from pandas import DataFrame

        row = self.to_json()
        parts = {f"breakdown_{name}": size for name, size in row.pop("breakdown").items()}
        return DataFrame([row | parts | {"attention": ", ".join(self.attention), "source": "predicted"}])


@dataclass(frozen=True)
class Capacity:
    """The largest shapes that fit cards, for each method.

    rows: method, asked ("batch_size" or "sequence_length"), at (the other one), memory_bytes of the card,
        largest (None: nothing fits), at_limit (there is room for more than was looked at), all_positions (the model
        ends there).
    refused: why a method has no row.  cards: bytes.  positions: the model's longest sequence; None: not known.
    cells: how many were predicted for it, in `predict_s` seconds.
    """

    model: str
    precision: str
    profile: str
    predict_s: float
    device: str
    verified: bool
    context_bytes: int
    default_profile: bool
    cards: list[int]
    positions: int | None
    source: str
    rows: list[dict[str, Any]]
    refused: dict[str, str]
    cells: int

    def to_json(self) -> dict[str, Any]:
        """What `meftbench fit --json` prints."""
        return asdict(self)

    def to_frame(self) -> DataFrame:
        """One row a method, question and card, as in `rows`."""
        from pandas import DataFrame

        return DataFrame([{"model": self.model, "precision": self.precision, **row} for row in self.rows])


def estimate(
    model: str,
    method: str,
    *,
    batch_size: int,
    sequence_length: int,
    profile: str | Path = PROFILE,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    allocator: str = "",
    allow_code: bool = False,
    tell: Tell | None = None,
    **axes: Any,
) -> Estimate:
    """Predict the memory of fine-tuning a model by a method on a GPU. Nothing is computed, no GPU is needed.

    model, method: as in a suite, "llama-3.2-1b@random", "lora+checkpoint".  config: overrides of the model's
        configuration.  settings: of the method.
    profile: a name of `meftbench list profiles`, or a file.  allocator: as PYTORCH_ALLOC_CONF has it.
    allow_code: whether functions of one's own that make models and batches may be called.  tell: is given progress.
    axes: what else a cell has: precision, micro_batch_size, attention, head, optimizer, batch; None: not said.

    Raises UserError: an unknown name, a value out of its range, a model or method that cannot be predicted.
    """
    _check_names("estimate", axes, PREDICTED_OPTIONS)
    profile, allocator = _text("profile", profile), _text("allocator", allocator)
    shape = {"batch_size": batch_size, "sequence_length": sequence_length}
    cell = asked_cell("estimate", model, method, profile, config, settings, allow_code, **shape, **axes)
    request = {"cell": cell.model_dump(mode="json"), "profile": profile, "allocator": allocator}
    return _estimate_of(cell, find_profile(profile), ask("estimate", request, tell or _silent, allow_code))


def _estimate_of(cell: Cell, device: Profile, answer: dict[str, Any]) -> Estimate:
    """The answer of meftbench.prediction.estimate, held against the device. Sizes come from metrics of a record."""
    value = {name: metric["value"] for name, metric in answer["metrics"].items()}
    return Estimate(
        label=cell.label,
        profile=device.name,
        device=device.device,
        verified=device.verified,
        memory_bytes=device.memory_bytes,
        context_bytes=value["context_bytes"],
        peak_allocated_bytes=value["peak_allocated_bytes"],
        peak_reserved_bytes=value["peak_reserved_bytes"],
        process_device_bytes=value["process_device_bytes"],
        headroom_bytes=device.memory_bytes - value["process_device_bytes"],
        fits=answer["fits"],
        retries=value["alloc_retries"],
        peak_phase=value["peak_phase"],
        breakdown={name.removesuffix("_bytes"): value[name] for name in BREAKDOWN},
        activation_peak_bytes=answer["activation_peak_bytes"],
        parameters_trainable=value["parameters_trainable"],
        parameters_total=value["parameters_total"],
        attention=answer["kernels"],
        predict_s=value["passes_s"],
        host_bytes=value["host_rss_peak_bytes"],
    )


def fit(
    model: str,
    *,
    memory: Sequence[int | str] | int | str = (),
    profile: str | Path | None = None,
    methods: Sequence[str] = FITTED_METHODS,
    sequence_lengths: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1,),
    config: Mapping[str, Any] | None = None,
    allocator: str = "",
    jobs: int | None = None,
    allow_code: bool = False,
    tell: Tell | None = None,
    ready: Callable[[], object] = _nothing,
    **axes: Any,
) -> Capacity:
    """Predict the largest batch and the longest sequence with which fine-tuning a model fits a card, for each method.

    Held against the card: what torch reserves, and the context of the process. Nothing is computed, no GPU is needed.

    memory: bytes of cards, or "24GiB"; empty: the profile's.  methods: with levers.
    sequence_lengths: the largest batch at each is looked for; empty: at 512, or what the model has.
    batch_sizes: the longest sequence at each is looked for.  jobs: methods at a time.
    ready: called when all that is named has been checked, before the minutes of predicting.
    config, allocator, allow_code, tell, axes: as of `estimate`; precision, attention, head, batch.

    Raises UserError: as `estimate`; a card that has no room for a process; every method is refused.
    """
    _check_names("fit", axes, FITTED_OPTIONS)
    chosen, allocator = _text("profile", profile or PROFILE), _text("allocator", allocator)
    device = find_profile(chosen, "fit: profile")
    if isinstance(methods, str) or not methods:
        raise UserError("methods", f"{methods!r} is not a list of methods", 'give names, ["lora", "meft1-exact"]')
    if jobs is not None:
        (jobs,) = _sizes("jobs", [jobs])
    asked = list(memory) if isinstance(memory, Sequence) and not isinstance(memory, str) else [memory]
    cards = sorted({_bytes(size) for size in asked}) or [device.memory_bytes]
    if cards[0] <= device.context_bytes:
        what = f"{format_bytes(cards[0])} is no more than the context of a process takes"
        raise UserError("memory", f"{what} ({format_bytes(device.context_bytes)})", "write more, such as 24GiB")
    longest, fixed = _positions(model, _mapping("config", config))
    lengths = _sizes("sequence_lengths", sequence_lengths) or _lengths(longest, fixed)
    cells = [
        asked_cell("fit", model, name, chosen, config, None, allow_code, batch_size=1, sequence_length=length, **axes)
        for name in methods
        for length in lengths
    ][:: len(lengths)]
    samples = [] if fixed else _sizes("batch_sizes", batch_sizes)
    request = {
        "cells": [cell.model_dump(mode="json") for cell in cells],
        "profile": chosen,
        "allocator": allocator,
        "capacities": [card - device.context_bytes for card in cards],
        "batches": [[length, min(MOST_SAMPLES, MOST_TOKENS // length)] for length in lengths],
        "lengths": [[batch, min(longest or MOST_TOKENS, MOST_TOKENS // batch)] for batch in samples],
        "jobs": min(jobs or min(2, os.cpu_count() or 1), len(cells)),
    }
    ready()
    answered = ask("fit", request, tell or _silent, allow_code)
    found = answered["methods"]
    if all(entry["refused"] for entry in found):
        raise UserError("", found[0]["refused"].rpartition("; ")[0], found[0]["refused"].rpartition("; ")[2])
    about: dict[str, Any] = {"model": cells[0].model_label, "precision": cells[0].precision}
    about |= {"profile": device.name, "predict_s": answered["seconds"]}
    about |= {"device": device.device, "verified": device.verified, "context_bytes": device.context_bytes}
    about |= {"default_profile": profile is None, "cards": cards, "positions": longest}
    return Capacity(**as_answer(about, found))


def asked_cell(
    verb: str,
    model: str,
    method: str,
    profile: str,
    config: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    allow_code: bool = False,
    **values: Any,
) -> Cell:
    """The predicted cell that `verb` is asked about, checked as a suite's is; values of None are not said.

    Raises UserError: a fault, or code of the user's own that is not allowed.
    """
    find_profile(profile, f"{verb}: profile")
    named = {"model": {"name": model, "config": _mapping("config", config)}, "device": PREDICTED + profile}
    named |= {"method": {"name": method, **_mapping("settings", settings)}}
    cell = cell_of(verb, named | {key: value for key, value in values.items() if value is not None})
    if cell.batch_size * cell.sequence_length > MOST_ASKED:
        what = f"{cell.batch_size:,} × {cell.sequence_length:,} tokens are more than any device has held"
        raise UserError(verb, what, "give fewer")
    check_allowed(places_of(cell, f"{verb}: model", f"{verb}: batch"), [cell], allow_code)
    return cell


def _check_names(verb: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise unknown(verb, "argument", name, known)


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str | os.PathLike):
        raise UserError(name, f"{given!r} is not a text", "give one, or leave it out")
    return os.fspath(given)


def _mapping(name: str, given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UserError(name, f"{given!r} is not a mapping", "give a dictionary, or leave it out")
    return dict(given or {})


def _sizes(name: str, given: Any) -> list[int]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = [given]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in given):
        raise UserError(name, f"{list(given)} is not a list of sizes", "give whole numbers from 1")
    return sorted(set(given))


def _bytes(size: Any) -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        what, _, cure = str(error).partition("; ")
        raise UserError("memory", what, cure) from None


def _positions(model: str, overrides: dict[str, Any]) -> tuple[int | None, int | None]:
    """The longest sequence of `model`, and the only one where it reads images; None: not known, or not fixed."""
    check_model("fit: model", model, overrides)
    fixed = image_tokens(known_config(model, overrides) or {})
    return fixed or max_positions(model, overrides), fixed


def _lengths(longest: int | None, fixed: int | None) -> list[int]:
    if fixed:
        return [fixed]
    return [length for length in FITTED_LENGTHS if longest is None or length <= longest] or [
        longest or FITTED_LENGTHS[0]
    ]
