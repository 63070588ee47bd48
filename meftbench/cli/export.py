"""`meftbench export`: one predicted cell for others to look at."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from meftbench.cli.options import DEFAULT_PROFILE, Override, Quiet, Setting, a_cell, progress


class Format(StrEnum):
    memory_viz = "memory_viz"
    timeline = "timeline"


def export(
    model: Annotated[str, typer.Argument(help="A name of `meftbench list models`, a hub id or a folder.")],
    method: Annotated[str, typer.Argument(help="A name of `meftbench list methods`, with levers: lora+checkpoint.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens a sample.")],
    format_: Annotated[
        Format, typer.Option("--format", help="memory_viz: a snapshot for pytorch.org/memory_viz. timeline: a figure.")
    ] = Format.memory_viz,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; a timeline is FILE.png and FILE.svg.")
    ] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a forward; divides the batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (the default), bf16, bf16-autocast ...")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa or eager.")] = None,
    head: Annotated[str | None, typer.Option(help="classification, causal_lm ...")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw (the default) or sgd.")] = None,
    config: Override = None,
    settings: Setting = None,
    profile: Annotated[str, typer.Option(help="A name of `meftbench list profiles`, or a file.")] = DEFAULT_PROFILE,
    allocator: Annotated[str, typer.Option(help="As PYTORCH_ALLOC_CONF: expandable_segments:True.")] = "",
    quiet: Quiet = False,
) -> None:
    """Write the predicted memory of a few steps: as torch's memory snapshot, or drawn as live bytes by category.

    The snapshot has every allocation since the model was built, and the allocator's segments at the end.
    """
    from meftbench.report.timeline import timeline_picture
    from meftbench.runner.predictions import ask

    values: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length}
    values |= {"micro_batch_size": micro_batch_size}
    values |= {"precision": precision, "attention": attention, "head": head, "optimizer": optimizer}
    cell = a_cell("export", model, method, profile, config, settings, **values)
    request: dict[str, Any] = {"cell": cell.model_dump(mode="json"), "profile": profile, "allocator": allocator}
    if format_ is Format.memory_viz:
        file = _writable(output or Path("snapshot.pickle"))
        ask(request | {"verb": "export", "snapshot": str(file.absolute())}, progress(quiet))
        print(f"{file}: drop it on https://pytorch.org/memory_viz")
    else:
        file = _writable(output or Path("timeline"))
        name = file.stem if file.suffix in (".png", ".svg") else file.name
        answer = ask(request | {"verb": "export", "snapshot": None}, progress(quiet))
        timeline_picture(answer, name).write(file.parent)
        print(f"{file.with_name(name + '.png')} and {name}.svg: written")


def _writable(file: Path) -> Path:
    """`file`, its folder there before the work begins. Raises UserError."""
    from meftbench.records.store import made

    made(file.parent)
    return file
