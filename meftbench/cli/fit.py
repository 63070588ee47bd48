"""`meftbench fit`: predicts the largest batch and the longest sequence of each method that fit a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from meftbench.cli import completion
from meftbench.cli.options import (
    MOST_JOBS,
    Allocator,
    AllowCode,
    AsJson,
    Attention,
    Batch,
    ForVersions,
    Head,
    Model,
    Optimizer,
    Override,
    Precision,
    ProfileName,
    Quiet,
    Resume,
    pairs,
    progress,
    say,
    say_next,
)
from meftbench.errors import UserError
from meftbench.escapes import path_text
from meftbench.plan.defaults import FITTED_METHODS


def fit(
    model: Model,
    memory: Annotated[
        list[str] | None, typer.Option(metavar="BYTES...", help="Of the card: 24GiB; several: '12GiB 24GiB', or again.")
    ] = None,
    profile: ProfileName = None,
    methods: Annotated[
        str, typer.Option(metavar="METHOD,...", help="With levers.", autocompletion=completion.method_lists)
    ] = ",".join(FITTED_METHODS),
    sequence_lengths: Annotated[
        str | None, typer.Option(metavar="N,...", help="Find the largest batch at each. Default: 512.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="Find the longest sequence at each.")] = "1",
    precision: Precision = None,
    attention: Attention = None,
    head: Head = None,
    optimizer: Optimizer = None,
    config: Override = None,
    batch: Batch = None,
    allow_code: AllowCode = False,
    allocator: Allocator = "",
    for_versions: ForVersions = "",
    jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST_JOBS, help="Methods at a time. Default: cores, at most 2.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV, Markdown, PNG and SVG.")] = None,
    resume: Resume = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict the largest batch and the longest sequence with which fine-tuning MODEL fits a card, for each method.

    What torch reserves and the context of the process together must fit. Nothing is computed, and no GPU is needed.
    """
    from meftbench.catalogue.labels import split_list
    from meftbench.estimates import fit as predict
    from meftbench.records.store import made
    from meftbench.report.views.fit import print_fit, write_fit

    sizes = [size for text in memory or [] for size in _sizes(text)]
    capacity = predict(
        model,
        memory=sizes,
        profile=profile,
        methods=[label for label in split_list(methods) if label],
        sequence_lengths=_numbers("--sequence-lengths", sequence_lengths) if sequence_lengths else (),
        batch_sizes=_numbers("--batch-sizes", batch_sizes),
        config=pairs("--config", config),
        allocator=allocator,
        for_versions=for_versions,
        jobs=jobs,
        resume=resume,
        allow_code=allow_code,
        tell=progress(quiet),
        ready=lambda: None if out is None else made(out),
        precision=precision,
        attention=attention,
        head=head,
        optimizer=optimizer,
        batch=batch,
    )
    answer = capacity.to_json()
    say(answer, as_json, print_fit)
    if out is not None:
        write_fit(answer, out)
        progress(quiet)(f"{path_text(out)}: written")
    of_card = ("--memory", memory[0].split()[0]) if memory and memory[0].split() else ()
    chosen = () if profile is None else ("--profile", profile)
    say_next(("plan", model, *of_card, *chosen), as_json=as_json)


def _sizes(text: str) -> list[int]:
    from meftbench.units import parse_bytes

    try:
        return [parse_bytes(part) for part in re.split(r"[\s,]+", text.strip()) if part]
    except ValueError as error:
        what, _, cure = str(error).partition("; ")
        raise UserError("--memory", what, cure) from None


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(option, f"{text!r} is not a list of sizes", "write 512,2048")
    return sorted({int(part) for part in parts})
