"""`meftbench estimate`: predicts memory and step time of one cell on a device that need not be present."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated, Any

import typer

from meftbench.cli.options import (
    Allocator,
    AllowCode,
    AsJson,
    Attention,
    Batch,
    ForVersions,
    Head,
    Method,
    MicroBatchSize,
    Model,
    Optimizer,
    Override,
    Packing,
    Parallelism,
    Precision,
    ProfileName,
    Quiet,
    Setting,
    WorldSize,
    pairs,
    progress,
    say,
    say_next,
)
from meftbench.cli.output import put
from meftbench.errors import DONE, OVER_BUDGET
from meftbench.plan.defaults import PROFILE


def estimate(
    model: Model,
    method: Method,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens a sample. Default: the model's longest, at most 2048.")
    ] = None,
    micro_batch_size: MicroBatchSize = None,
    precision: Precision = None,
    attention: Attention = None,
    head: Head = None,
    optimizer: Optimizer = None,
    packing: Packing = None,
    world_size: WorldSize = None,
    parallelism: Parallelism = None,
    config: Override = None,
    settings: Setting = None,
    batch: Batch = None,
    allow_code: AllowCode = False,
    profile: ProfileName = None,
    allocator: Allocator = "",
    for_versions: ForVersions = "",
    fail_if_too_big: Annotated[bool, typer.Option("--fail-if-too-big", help="Exit 1 if it does not fit.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict memory and step time of fine-tuning MODEL by METHOD on a GPU. Nothing is computed, and no GPU is needed.

    Exits 0 whether or not it fits; with --fail-if-too-big, 1 if it does not.
    """
    from meftbench.estimates import estimate as predict

    prediction = predict(
        model,
        method,
        batch_size=batch_size,
        sequence_length=sequence_length,
        profile=profile or PROFILE,
        config=pairs("--config", config),
        settings=pairs("--set", settings),
        allocator=allocator,
        for_versions=for_versions,
        allow_code=allow_code,
        tell=progress(quiet),
        batch=batch,
        micro_batch_size=micro_batch_size,
        precision=precision,
        attention=attention,
        head=head,
        optimizer=optimizer,
        packing=packing,
        world_size=world_size,
        parallelism=parallelism,
    )

    def printed(answer: dict[str, Any]) -> None:
        put(*folded([*lines(answer, by_default=profile is None), *next_steps(model, answer)]))

    answer = prediction.to_json()
    say(answer, as_json, printed)
    if answer["fits"]:  # else `next_steps` has said what to try
        chosen = () if profile is None else ("--profile", profile)
        say_next(("fit", model, *chosen), ("plan", model, *chosen), as_json=as_json)
    raise typer.Exit(OVER_BUDGET if fail_if_too_big and not answer["fits"] else DONE)


def folded(texts: list[str]) -> list[str]:
    """The lines, wrapped at the terminal's width (80 columns if there is no terminal) with continuations indented."""
    width = max(40, shutil.get_terminal_size().columns)
    return [
        part.rstrip()
        for line in texts
        for part in textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
            break_on_hyphens=False,
            drop_whitespace=False,
        )
    ]


def lines(answer: dict[str, Any], by_default: bool = False) -> list[str]:
    """The answer as lines for the terminal, every number with its unit and source."""
    from meftbench.units import format_bytes, format_duration

    def row(name: str, nbytes: int, about: str = "") -> str:
        return f"  {name:<22}{format_bytes(nbytes):>12}  predicted{f', {about}' if about else ''}"

    default = " (default; see --profile)" if by_default else ""
    device = f"{answer['device']}, {format_bytes(answer['memory_bytes'])}"
    texts = [answer["label"], f"on {device}, profile {answer['profile']}{default}"]
    texts += [answer["validation"], f"rules of {answer['rules']}"]
    paged, context = answer.get("optimizer_paged_bytes"), format_bytes(answer["context_bytes"])
    of_process = {"peak reserved": "by torch's allocator", "process": f"context of {context} included"}
    sizes = {"peak reserved": answer["peak_reserved_bytes"], "process": answer["process_device_bytes"]}
    texts += [
        row("peak allocated", answer["peak_allocated_bytes"], f"in {answer['peak_phase']}"),
        *(row(name, size, of_process[name]) for name, size in sizes.items() if size is not None),
        *([] if paged is None else [row("paged states", paged, "beside: CUDA moves them to the host where it must")]),
        f"  {verdict(answer)}",
        "breakdown of the peak allocated",
        *(row(name.replace("optimizer", "optimizer state"), size) for name, size in _largest(answer["breakdown"])),
        "training step",
        row("activation peak", answer["activation_peak_bytes"], "above the level before the step"),
        f"  {'parameters':<22}{answer['parameters_trainable']:,} trained of {answer['parameters_total']:,}, counted",
        f"  {'attention':<22}{', '.join(answer['attention'])}, predicted",
        *times(answer),
        f"predicted in {format_duration(answer['predict_s'])} with {format_bytes(answer['host_bytes'])} of host memory",
    ]
    return texts


def times(answer: dict[str, Any]) -> list[str]:
    """What a step costs: its predicted time and where that goes, or why there is none; what it does twice or moves."""
    from meftbench.units import format_bytes, format_duration

    texts = []
    if answer["step_s"] is None:
        texts.append(f"  {'time':<22}not predicted: {answer['time_absent']}")
    else:
        speed = f"predicted, {answer['tokens_per_s']:,.0f} tokens a second"
        texts.append(f"  {'time':<22}{format_duration(answer['step_s']):>12}  {speed}")
        spent = sorted(answer["time_parts"].items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {part / answer['step_s']:.0%}" for name, part in spent if part > 0)
        texts += [f"  {'of it':<22}{shares}", f"  {'its error':<22}{answer['time_validation']}"]
    texts.append(f"  {'recomputed':<22}{answer['recomputed_flops_share']:.1%} of operations, predicted")
    if answer["host_transfer_bytes"]:
        moved = format_bytes(answer["host_transfer_bytes"])
        texts.append(f"  {'moved':<22}{moved:>12}  predicted, to host memory and back")
    return texts


def verdict(answer: dict[str, Any]) -> str:
    """Whether the step fits the device, as a sentence."""
    from meftbench.units import format_bytes

    if not answer["fits"]:
        missing = max(-answer["headroom_bytes"], 0)
        return f"does not fit: {format_bytes(missing)} too much, predicted"
    if answer["headroom_bytes"] < 0:
        return f"fits only as torch gives back what it has cached: {answer['retries']} times, predicted"
    return f"fits, headroom {format_bytes(answer['headroom_bytes'])}, predicted"


def next_steps(model: str, answer: dict[str, Any]) -> list[str]:
    """What to try where the step does not fit; nothing where it does."""
    if answer["fits"]:
        return []
    from meftbench.units import format_bytes

    memory = format_bytes(answer["memory_bytes"]).replace(" ", "")
    asked = f"--memory {memory} --profile {answer['profile']}"
    return [
        "what to try next",
        f"  which methods, levers and micro-batches fit: meftbench plan {model} {asked}",
        f"  which card is needed: meftbench plan {model} --needs --profile {answer['profile']}",
    ]


def _largest(breakdown: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, size) for name, size in breakdown.items() if size), key=lambda item: -item[1])
