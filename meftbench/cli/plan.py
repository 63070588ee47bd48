"""`meftbench plan`: which method and levers train a model on a card, and what does it cost?"""

from __future__ import annotations

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
    ProfileName,
    Quiet,
    Resume,
    pairs,
    progress,
    say,
    say_next,
)
from meftbench.errors import DONE, OVER_BUDGET
from meftbench.escapes import path_text


def plan(
    model: Model,
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Of the card: 24GiB. Default: the profile's.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens a sample. Default: the model's longest, at most 2048.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples a step, in micro-batches. Default: one micro-batch.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,...",
            help="Labels as they are printed. One with levers: as it is.",
            autocompletion=completion.method_lists,
        ),
    ] = None,
    levers: Annotated[str, typer.Option(metavar="all|none|NAME,...", help="Levers to try.")] = "all",
    precision: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Default: bf16 for language models, else fp32.")
    ] = None,
    profile: ProfileName = None,
    larger: Annotated[
        list[str] | None, typer.Option("--next", metavar="BYTES", help="A larger card, and what it buys; again: more.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each lever saves here.")] = False,
    needs: Annotated[bool, typer.Option("--needs", help="Say the smallest card for each method.")] = False,
    price: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your prices per hour and card (docs/plan.md).")
    ] = None,
    shape_map: Annotated[bool, typer.Option("--map", help="Memory of the answer by batch and length.")] = False,
    attention: Attention = None,
    head: Head = None,
    optimizer: Optimizer = None,
    config: Override = None,
    batch: Batch = None,
    allow_code: AllowCode = False,
    allocator: Allocator = "",
    for_versions: ForVersions = "",
    jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST_JOBS, help="Processes. Default: cores, at most 2.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for plan.md, plan.csv, plots and a suite.")] = None,
    resume: Resume = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search methods, levers and micro-batches for what trains MODEL on a card: the fastest, the smallest, what lies
    between, and what to type for it. Predicted; no GPU is needed.

    Exits 1 where nothing fits; with --needs and no --memory, where no shipped card is large enough.
    """
    from meftbench.catalogue.labels import split_list
    from meftbench.planned import plan_for
    from meftbench.records.store import made
    from meftbench.report.render.plan_files import write_plan
    from meftbench.report.views.plan import print_plan

    found = plan_for(
        model,
        memory=memory,
        sequence_length=sequence_length,
        batch_size=batch_size,
        methods=None if methods is None else [label for label in split_list(methods) if label],
        levers=levers if levers in ("all", "none") else [name for name in split_list(levers) if name],
        precision=None if precision is None else [name for name in split_list(precision) if name],
        optimizer=optimizer,
        profile=profile,
        larger=larger,
        explain=explain,
        needs=needs,
        shape_map=shape_map,
        prices=price,
        config=pairs("--config", config),
        allocator=allocator,
        for_versions=for_versions,
        jobs=jobs,
        resume=resume,
        allow_code=allow_code,
        tell=progress(quiet),
        ready=lambda: None if out is None else made(out),
        attention=attention,
        head=head,
        batch=batch,
    )
    answer = found.to_json()
    say(answer, as_json, print_plan)
    if out is not None:
        progress(quiet)(f"{path_text(out)}: {', '.join(write_plan(answer, out))} written")
    chosen = () if profile is None else ("--profile", profile)
    of_card = () if memory is None else ("--memory", memory)
    if answer["fastest"] is None:
        say_next(("plan", model, "--needs", *chosen), as_json=as_json)
    elif out is not None:
        say_next(("run", out / "answer.yaml", "--dry-run"), as_json=as_json)
    else:
        say_next(("plan", model, *of_card, *chosen, "--explain"), ("plan", model, *of_card, *chosen, "--out", "DIR"),
                 as_json=as_json)  # fmt: skip
    if needs and memory is None:
        raise typer.Exit(DONE if any(entry["card"] for entry in answer["needs"]) else OVER_BUDGET)
    raise typer.Exit(DONE if answer["fastest"] is not None else OVER_BUDGET)
