"""`meftbench fit`: the largest batch and the longest sequence of each method, by the size of the card."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from meftbench.cli.options import (
    DEFAULT_PROFILE,
    Allocator,
    AllowCode,
    AsJson,
    Attention,
    Batch,
    Head,
    Model,
    Override,
    Precision,
    ProfileName,
    Quiet,
    a_cell,
    pairs,
    progress,
)
from meftbench.errors import UserError

METHODS = (
    "full,full+checkpoint,lora,lora+checkpoint,lora+checkpoint+chunked_loss,parallel,meft1-exact,"
    "meft1-exact+chunked_loss"
)
LENGTHS = (512,)
# Beyond these nothing is looked at; where a card has room for them, that is said.
MOST_TOKENS = 2**24
MOST_SAMPLES = 2**16


def fit(
    model: Model,
    memory: Annotated[
        list[str] | None, typer.Option(metavar="BYTES...", help="Of the card: 24GiB; several: '12GiB 24GiB', or again.")
    ] = None,
    profile: ProfileName = None,
    methods: Annotated[str, typer.Option(metavar="METHOD,...", help="With levers.")] = METHODS,
    sequence_lengths: Annotated[
        str | None, typer.Option(metavar="N,...", help="The largest batch at each. Default: 512.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="The longest sequence at each.")] = "1",
    precision: Precision = None,
    attention: Attention = None,
    head: Head = None,
    config: Override = None,
    batch: Batch = None,
    allow_code: AllowCode = False,
    allocator: Allocator = "",
    jobs: Annotated[int | None, typer.Option(min=1, help="Methods at a time. Default: cores, at most 2.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV, Markdown, PNG and SVG.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict the largest batch and the longest sequence with which fine-tuning MODEL fits a card, for each method.

    Held against the card: what torch reserves, and the context of the process. Nothing is computed, no GPU is needed.
    """
    from meftbench.plan.profiles import find_profile
    from meftbench.records.store import made
    from meftbench.report.fit import as_answer, print_fit, write_fit
    from meftbench.runner.predictions import ask
    from meftbench.units import format_bytes

    chosen = profile or DEFAULT_PROFILE
    device = find_profile(chosen, "fit: profile")
    cards = sorted({size for text in memory or [] for size in _sizes(text)}) or [device.memory_bytes]
    if cards[0] <= device.context_bytes:
        what = f"{format_bytes(cards[0])} is no more than the context of a process takes"
        raise UserError("--memory", f"{what} ({format_bytes(device.context_bytes)})", "write more, such as 24GiB")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    said: dict[str, Any] = {"precision": precision, "attention": attention, "head": head, "batch": batch}
    longest, fixed = _positions(model, config)
    lengths = _numbers("--sequence-lengths", sequence_lengths) if sequence_lengths else _lengths(longest, fixed)
    cells = [
        a_cell("fit", model, name, chosen, config, None, allow_code, batch_size=1, sequence_length=length, **said)
        for name in names
        for length in lengths
    ][:: len(lengths)]
    samples = [] if fixed else _numbers("--batch-sizes", batch_sizes)
    request = {
        "verb": "fit",
        "cells": [cell.model_dump(mode="json") for cell in cells],
        "profile": chosen,
        "allocator": allocator,
        "capacities": [card - device.context_bytes for card in cards],
        "batches": [[length, min(MOST_SAMPLES, MOST_TOKENS // length)] for length in lengths],
        "lengths": [[batch, min(longest or MOST_TOKENS, MOST_TOKENS // batch)] for batch in samples],
        "jobs": min(jobs or min(2, os.cpu_count() or 1), len(cells)),
    }
    if out is not None:
        made(out)  # not after minutes of predicting
    answered = ask(request, progress(quiet), allow_code)
    found = answered["methods"]
    if all(entry["refused"] for entry in found):
        raise UserError("", found[0]["refused"].rpartition("; ")[0], found[0]["refused"].rpartition("; ")[2])
    about: dict[str, Any] = {"model": cells[0].model_label, "precision": cells[0].precision}
    about |= {"profile": device.name, "predict_s": answered["seconds"]}
    about |= {"device": device.device, "verified": device.verified, "context_bytes": device.context_bytes}
    answer = as_answer(about | {"default_profile": profile is None, "cards": cards, "positions": longest}, found)
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print_fit(answer)
    if out is not None:
        write_fit(answer, out)
        progress(quiet)(f"{out}: written")


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


def _positions(model: str, config: list[str] | None) -> tuple[int | None, int | None]:
    """The longest sequence of `model`, and the only one where it reads images; None: not known, or not fixed."""
    from meftbench.plan.models import check_model, image_tokens, known_config, max_positions

    overrides = pairs("--config", config)
    check_model("fit: model", model, overrides)
    fixed = image_tokens(known_config(model, overrides) or {})
    return fixed or max_positions(model, overrides), fixed


def _lengths(longest: int | None, fixed: int | None) -> list[int]:
    if fixed:
        return [fixed]
    return [length for length in LENGTHS if longest is None or length <= longest] or [longest or LENGTHS[0]]
