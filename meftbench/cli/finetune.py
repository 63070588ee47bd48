"""`meftbench finetune`: train a model on a task and score it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from meftbench.cli import completion
from meftbench.cli.options import (
    MOST_JOBS,
    AllowCode,
    AsJson,
    Attention,
    Method,
    MicroBatchSize,
    Model,
    Optimizer,
    Override,
    Packing,
    Quiet,
    Setting,
    pairs,
    typed,
)
from meftbench.errors import UserError


def finetune(
    context: typer.Context,
    model: Model,
    method: Method,
    task: Annotated[
        str,
        typer.Argument(
            help="A name of `meftbench list tasks`, or a folder with data and task.yaml.",
            autocompletion=completion.tasks,
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Folder of the data.  [default: $MEFTBENCH_DATA, or the Hugging Face hub]")
    ] = None,
    learning_rate: Annotated[str, typer.Option(metavar="R,...", help="Several: the best is chosen.")] = "5e-4",
    seed: Annotated[str, typer.Option(metavar="S,...", help="Several: the spread is reported.")] = "0",
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.  [default: 3]")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 16,
    micro_batch_size: MicroBatchSize = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens a sample, at most.  [default: the task's]")
    ] = None,
    train_examples: Annotated[int | None, typer.Option(min=1, help="Use so many training rows.")] = None,
    evaluation_examples: Annotated[int | None, typer.Option(min=1, help="Use so many rows to score.")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="How often to score.  [default: 4]")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="End after so many scores without a better one.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (the default), bf16-autocast ...")] = None,
    attention: Attention = None,
    packing: Packing = None,
    optimizer: Optimizer = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id.  [default: the model's own]")] = None,
    config: Override = None,
    settings: Setting = None,
    allow_code: AllowCode = False,
    device: Annotated[str, typer.Option(help="auto, cuda or counted.")] = "auto",
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep the best weights in the run folder."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder.  [default: runs/finetune-TASK-TIME]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with the run in --out, from its last checkpoint.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=MOST_JOBS, help="Trainings at a time; on CUDA one a GPU.")] = 1,
    timeout: Annotated[str, typer.Option(help="Time allowed for a training: 90s, 10m, 24h.")] = "24h",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train MODEL by METHOD on TASK; print its score, and the memory and time of its steps.

    A run like those of `meftbench run`: `report`, `show` and `compare` read it. Exits 3 if a training failed.
    """
    from meftbench.cli.run import finish, on_device, sweep_to
    from meftbench.plan.suite import parse_suite
    from meftbench.runner.folder import default_folder
    from meftbench.strict_yaml import Document

    training = {
        "data": data,
        "epochs": epochs,
        "max_steps": max_steps,
        "train_examples": train_examples,
        "evaluation_examples": evaluation_examples,
        "evaluations": evaluations,
        "patience": patience,
        "tokenizer": tokenizer,
        "keep": "best" if keep else "nothing",
    }
    point = {
        "model": {"name": model, "config": pairs("--config", config)},
        "method": {"name": method, **pairs("--set", settings)},
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "sequence_length": sequence_length,
        "precision": precision,
        "attention": attention,
        "packing": packing,
        "optimizer": optimizer,
    }
    content: dict[str, Any] = {
        "schema": 1,
        "name": "finetune-" + re.sub(r"[^A-Za-z0-9_.-]", "-", Path(task).name),
        "description": f"{model}, {method}, {task}",
        "allow_code": allow_code,
        "protocol": {"passes": ["memory"], "warmup": 1, "steps": 1, "repeats": 1, "timeout": timeout},
        "training": {key: value for key, value in training.items() if value is not None},
        "defaults": {key: value for key, value in point.items() if value is not None},
        "tasks": [task],
        "grid": {
            "learning_rate": _numbers("--learning-rate", learning_rate, float, "write 5e-4 or 1e-4,5e-4"),
            "seed": _numbers("--seed", seed, int, "write 0 or 0,1,2"),
        },
    }
    command = typed(context)
    suite = on_device(parse_suite(Document(Path("finetune"), content, {})), device)
    suite = replace(suite, source=None, command=command)
    folder = out or default_folder(suite.name)
    retried = frozenset({"error", "timeout"}) if resume else frozenset()
    finished, expected = sweep_to(folder, suite, command, quiet=quiet, resume=resume, retry=retried, jobs=jobs)
    raise typer.Exit(finish(finished, as_json, expected))


def _numbers(option: str, text: str, kind: type, cure: str) -> list[Any]:
    """The numbers of a comma-separated list. Raises UserError: there is none, or one is negative."""
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or any(number < 0 for number in numbers):
        raise UserError(option, f"{text!r} is not a list of numbers", cure)
    return numbers
