"""Predictions from Python, without a GPU: the memory of one cell, and the largest shapes that fit a card.

`meftbench estimate` and `meftbench fit` print what these functions return. Torch is not imported here, since a
prediction runs in a process of its own.
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
    positions_of,
    silent,
    text_of,
)
from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.catalogue.profiles import CpuProfile, Profile, find_device, find_profile
from meftbench.catalogue.validated import about_times, about_validation
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.plan.axes import FITTED_OPTIONS, PREDICTED_OPTIONS
from meftbench.plan.cell import Cell
from meftbench.plan.defaults import FITTED_LENGTHS, FITTED_METHODS, PROFILE
from meftbench.plan.factories import is_factory
from meftbench.plan.models import check_model
from meftbench.plan.sensible import sensible_length, sensible_precision
from meftbench.report.views.fit import as_answer
from meftbench.runner.kept import ask_kept
from meftbench.runner.predictions import ask

if TYPE_CHECKING:
    from pandas import DataFrame

# `fit` tries no larger shapes: where even the largest of them fits, the answer says so (`at_limit`).
MOST_TOKENS = 2**24
MOST_SAMPLES = 2**16

# The parts of the peak in the order in which they are printed, the workspace last.
_PARTS = sorted(BREAKDOWN, key="workspace_bytes".__eq__)

# Added to how far off predictions were, for a cell of several ranks.
_OF_RANKS = (
    "; this is the largest of several ranks, of which predictions were held against counts of two ranks on a CPU, "
    "never against GPUs, and what NCCL holds is in no number"
)

_OF_CPU = "memory of the step's tensors on a CPU, counted by a trace"


@dataclass(frozen=True)
class Estimate:
    """The predicted memory and time of one training step. Sizes are in bytes.

    On a CPU, `peak_reserved_bytes` and `process_device_bytes` are None: memory is that of tensors alone.

    device, memory_bytes: name and memory of the device.  context_bytes: what a process takes there before any tensor.
    verified: whether a run on this device agreed with predictions.  validation: what predictions were held against, and
        how far off they were, as a sentence.  rules: the versions whose rules were taken.
    peak_allocated_bytes: the largest sum of live blocks, reached in the phase `peak_phase`; it is the sum of the parts
        in `breakdown`.
    peak_reserved_bytes: the largest sum of the segments that torch's allocator takes from the device.
    process_device_bytes: the same with the context.  headroom_bytes: what then is left of the device's memory.
    fits: whether the step can run on the device.  retries: how often torch must give back its cached memory for that.
    activation_peak_bytes: the peak of forward and backward above what is allocated right before the step.
    optimizer_paged_bytes: states of a paged optimizer in CUDA's unified memory, which is in none of the other numbers;
        None: the optimizer pages nothing.
    parameters_trainable, parameters_total: numbers of parameters, counted.  attention: the attention kernels that run.
    step_s, tokens_per_s: predicted time of a step after the first, and its tokens a second; None: see `time_absent`.
        time_parts: seconds of `step_s` by what they are spent on (prediction/seconds.py), which add up to it.
        time_validation: how far off predicted times were, as a sentence.
    recomputed_flops_share: share of a step's operations that run forward again in the backward pass, predicted.
    host_transfer_bytes: copied between the device and host memory in a step, predicted.
    predict_s, host_bytes: seconds and memory that the prediction took on this machine, measured.
    """

    label: str
    profile: str
    device: str
    verified: bool
    validation: str
    rules: str
    memory_bytes: int
    context_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    process_device_bytes: int | None
    headroom_bytes: int
    fits: bool
    retries: int
    peak_phase: str
    breakdown: dict[str, int]
    activation_peak_bytes: int
    optimizer_paged_bytes: int | None
    parameters_trainable: int
    parameters_total: int
    attention: list[str]
    predict_s: float
    host_bytes: int
    step_s: float | None = None
    tokens_per_s: float | None = None
    time_parts: dict[str, float] | None = None
    time_absent: str | None = None
    time_validation: str = ""
    recomputed_flops_share: float = 0.0
    host_transfer_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """What `meftbench estimate --json` prints."""
        return asdict(self)

    def to_frame(self) -> DataFrame:
        """One row. The parts of breakdown and time are columns: `breakdown_parameters`, `time_matrix` and so on."""
        from pandas import DataFrame

        row = self.to_json()
        parts = {f"breakdown_{name}": size for name, size in row.pop("breakdown").items()}
        parts |= {f"time_{name}": seconds for name, seconds in (row.pop("time_parts") or {}).items()}
        return DataFrame([row | parts | {"attention": ", ".join(self.attention), "source": "predicted"}])


@dataclass(frozen=True)
class Capacity:
    """The largest shapes that fit cards, for each method.

    rows: each has method, asked ("batch_size" or "sequence_length"), at (the size of the other), memory_bytes of the
        card, largest (None: nothing fits), at_limit (`largest` is the largest size that was tried) and all_positions
        (it is also the longest sequence that the model has positions for).
    refused: why a method has no row, by method.  cards: their memory in bytes.
    positions: the longest sequence that the model has positions for; None: not known.
    default_profile: whether no profile was named.  cells: how many were predicted, in `predict_s` seconds.
    """

    model: str
    precision: str
    profile: str
    predict_s: float
    device: str
    verified: bool
    validation: str
    rules: str
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
        """A table of `rows`: one row for each method, question and card."""
        from pandas import DataFrame

        return DataFrame([{"model": self.model, "precision": self.precision, **row} for row in self.rows])


def estimate(
    model: str | Mapping[str, Any],
    method: str | Mapping[str, Any],
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    profile: str | Path = PROFILE,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    allocator: str = "",
    for_versions: str = "",
    allow_code: bool = False,
    tell: Tell | None = None,
    **axes: Any,
) -> Estimate:
    """Predict memory and step time of fine-tuning a model by a method on a GPU. Nothing is computed; no GPU is needed.

    model, method: as in a suite, such as "llama-3.2-1b@random" and "lora+checkpoint", or {"name": "lora", "rank": 4}.
        config: overrides of the model's configuration.  settings: of the method.
    batch_size: samples per step.  sequence_length: tokens per sample; None: the model's longest, 2,048 at most.
    profile: a name of `meftbench list profiles`, or a file; one that `meftbench doctor --calibrate` wrote on a CPU is
        for a step on that CPU.  allocator: settings in the form of PYTORCH_ALLOC_CONF.
    for_versions: such as "torch=2.4,transformers=4.48", where a rule is known to differ; empty: the newest.
    allow_code: whether the user's own functions that make models and batches may be called.
    tell: called with lines of progress.
    axes: further values of the cell: precision, micro_batch_size, attention, head, optimizer, packing, batch,
        world_size, parallelism; None: the default, which is bf16 for language models and fp32 for others where it is
        that of the precision. Of several ranks, memory is that of the largest.

    Raises UserError: a name is unknown, a value is out of its range, or the model or method cannot be predicted.
    """
    check_names("estimate", axes, PREDICTED_OPTIONS)
    profile, allocator = text_of("profile", profile), text_of("allocator", allocator)
    name = model if isinstance(model, str) else str(model.get("name", ""))
    overrides = mapping_of("config", config if isinstance(model, str) else config or model.get("config"))
    if not is_factory(name) or sequence_length is None:
        check_model("estimate: model", name, overrides)
        axes["precision"] = axes.get("precision") or sensible_precision(name, overrides, axes.get("head"))
    shape = {"batch_size": batch_size, "sequence_length": sequence_length or sensible_length(name, overrides)}
    cell = asked_cell("estimate", model, method, profile, config, settings, allow_code, **shape, **axes)
    rules = str(Versions.parse(text_of("for_versions", for_versions)))
    request = {"cell": cell.model_dump(mode="json"), "profile": profile, "allocator": allocator}
    request["versions"] = for_versions
    return _estimate_of(cell, find_device(profile), rules, ask("estimate", request, tell or silent, allow_code))


def _estimate_of(cell: Cell, device: Profile | CpuProfile, rules: str, answer: dict[str, Any]) -> Estimate:
    """The answer of meftbench.prediction.estimate, which has metrics as in a record, with the facts of the device."""
    values = {name: metric["value"] for name, metric in answer["metrics"].items()}
    cost = answer["time"]
    on_gpu = isinstance(device, Profile)
    process = values["process_device_bytes"] if on_gpu else None
    return Estimate(
        label=cell.label,
        profile=device.name,
        device=device.device,
        verified=isinstance(device, Profile) and device.verified,
        validation=(about_validation(device) if isinstance(device, Profile) else _OF_CPU)
        + (_OF_RANKS if cell.parallelism else ""),
        rules=rules,
        memory_bytes=device.memory_bytes,
        context_bytes=values["context_bytes"] if on_gpu else 0,
        peak_allocated_bytes=values["peak_allocated_bytes"],
        peak_reserved_bytes=values["peak_reserved_bytes"] if on_gpu else None,
        process_device_bytes=process,
        headroom_bytes=device.memory_bytes - (process or values["peak_allocated_bytes"]),
        fits=answer["fits"],
        retries=values["alloc_retries"] if on_gpu else 0,
        peak_phase=values["peak_phase"],
        breakdown={
            name.removesuffix("_bytes"): values[name]
            for name in sorted(BREAKDOWN, key="workspace_bytes".__eq__)
            if name in values
        },
        activation_peak_bytes=answer["activation_peak_bytes"],
        optimizer_paged_bytes=values.get("optimizer_paged_bytes"),
        parameters_trainable=values["parameters_trainable"],
        parameters_total=values["parameters_total"],
        attention=answer["kernels"],
        predict_s=values["passes_s"],
        host_bytes=values["host_rss_peak_bytes"],
        step_s=cost["step_s"],
        tokens_per_s=cost["tokens_per_s"],
        time_parts=cost["time_parts"],
        time_absent=cost["time_absent"],
        time_validation=about_times(device),
        recomputed_flops_share=cost["recomputed_flops_share"],
        host_transfer_bytes=cost["host_transfer_bytes"],
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
    for_versions: str = "",
    jobs: int | None = None,
    resume: bool = False,
    allow_code: bool = False,
    tell: Tell | None = None,
    ready: Callable[[], object] = nothing,
    **axes: Any,
) -> Capacity:
    """Predict the largest batch and the longest sequence with which fine-tuning a model fits a card, for each method.

    What torch reserves and the context of the process together must fit. Nothing is computed, and no GPU is needed.

    memory: that of one or more cards, in bytes or as text such as "24GiB"; empty: that of the profile.
    methods: with memory optimisations (levers), such as "lora+checkpoint".
    sequence_lengths: for each, the largest batch is looked for; empty: 512, or the model's longest where that is less.
    batch_sizes: for each, the longest sequence is looked for.  jobs: how many processes predict at a time.
    resume: whether what an interrupted search for the same has found is taken up.
    ready: called when all arguments have been checked, before the predictions, which take minutes.
    profile, config, allocator, for_versions, allow_code, tell: as of `estimate`.
    axes: precision, attention, head, optimizer, batch.

    Raises UserError: as `estimate`; a card has no room even for the context of a process; every method is refused.
    """
    check_names("fit", axes, FITTED_OPTIONS)
    chosen, allocator = text_of("profile", profile or PROFILE), text_of("allocator", allocator)
    rules = str(Versions.parse(text_of("for_versions", for_versions)))
    device = find_profile(chosen, "fit: profile")
    if isinstance(methods, str) or not methods:
        raise UserError("methods", f"{methods!r} is not a list of methods", 'give names, ["lora", "meft1-exact"]')
    if jobs is not None:
        check_jobs(jobs)
    sizes = list(memory) if isinstance(memory, Sequence) and not isinstance(memory, str) else [memory]
    cards = sorted({bytes_of(size) for size in sizes}) or [device.memory_bytes]
    check_room(cards[0], device)
    longest, of_image = positions_of("fit", model, mapping_of("config", config))
    lengths = _sizes("sequence_lengths", sequence_lengths) or _lengths(longest, of_image)
    # Every length is checked, and one cell of each method is kept: `fit` varies its shape.
    cells = [
        asked_cell("fit", model, name, chosen, config, None, allow_code, batch_size=1, sequence_length=length, **axes)
        for name in methods
        for length in lengths
    ][:: len(lengths)]
    samples = [] if of_image else _sizes("batch_sizes", batch_sizes)
    for name, asked in (("sequence_lengths", lengths), ("batch_sizes", samples)):
        if asked and asked[-1] > MOST_TOKENS:
            raise UserError(name, f"{asked[-1]:,} is more than is looked at", f"give at most {MOST_TOKENS:,}")
    request = {
        "cells": [cell.model_dump(mode="json") for cell in cells],
        "profile": chosen,
        "allocator": allocator,
        "versions": for_versions,
        "capacities": [card - device.context_bytes for card in cards],
        "batches": [[length, min(MOST_SAMPLES, MOST_TOKENS // length)] for length in lengths],
        "lengths": [[batch, min(longest or MOST_TOKENS, MOST_TOKENS // batch)] for batch in samples],
        "jobs": min(jobs or min(2, os.cpu_count() or 1), len(cells)),
    }
    ready()
    answer = ask_kept("fit", request, tell or silent, allow_code, resume)
    answers = answer["methods"]
    if all(entry["refused"] for entry in answers):
        raise UserError("", answers[0]["refused"].rpartition("; ")[0], answers[0]["refused"].rpartition("; ")[2])
    about: dict[str, Any] = {"model": cells[0].model_label, "precision": cells[0].precision}
    about |= {"profile": device.name, "predict_s": answer["seconds"]}
    about |= {"device": device.device, "verified": device.verified, "context_bytes": device.context_bytes}
    about |= {"validation": about_validation(device), "rules": rules}
    about |= {"default_profile": profile is None, "cards": cards, "positions": longest}
    return Capacity(**as_answer(about, answers))


def _sizes(name: str, sizes: Any) -> list[int]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        sizes = [sizes]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise UserError(name, f"{list(sizes)} is not a list of sizes", "give whole numbers from 1")
    return sorted(set(sizes))


def _lengths(longest: int | None, of_image: int | None) -> list[int]:
    if of_image:
        return [of_image]
    return [length for length in FITTED_LENGTHS if longest is None or length <= longest] or [
        longest or FITTED_LENGTHS[0]
    ]
