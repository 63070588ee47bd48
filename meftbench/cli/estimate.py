"""`meftbench estimate`: the memory of one cell on a GPU that is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meftbench.errors import DONE, OVER_BUDGET, UserError

if TYPE_CHECKING:
    from meftbench.plan.cell import Cell

DEFAULT_PROFILE = "a100-80gb"

Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method: adapter_size=8.")
]
Override = Annotated[
    list[str] | None, typer.Option("--config", metavar="KEY=VALUE", help="Overrides the model's configuration.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def estimate(
    model: Annotated[str, typer.Argument(help="A name of `meftbench list models`, a hub id or a folder.")],
    method: Annotated[str, typer.Argument(help="A name of `meftbench list methods`, with levers: lora+checkpoint.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens a sample.")],
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a forward; divides the batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (the default), bf16, bf16-autocast ...")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa or eager.")] = None,
    head: Annotated[str | None, typer.Option(help="classification, causal_lm ...")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw (the default) or sgd.")] = None,
    config: Override = None,
    settings: Setting = None,
    profile: Annotated[
        str | None, typer.Option(help=f"A name of `meftbench list profiles`, or a file.  [default: {DEFAULT_PROFILE}]")
    ] = None,
    allocator: Annotated[str, typer.Option(help="As PYTORCH_ALLOC_CONF: expandable_segments:True.")] = "",
    fail_if_too_big: Annotated[bool, typer.Option("--fail-if-too-big", help="Exit 1 if it does not fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Predict the memory of fine-tuning MODEL by METHOD on a GPU. Nothing is computed, no GPU is needed.

    Exits 0 whether or not it fits; with --fail-if-too-big, 1 if it does not.
    """
    from meftbench.runner.predictions import ask

    chosen = profile or DEFAULT_PROFILE
    values: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length}
    values |= {"micro_batch_size": micro_batch_size}
    values |= {"precision": precision, "attention": attention, "head": head, "optimizer": optimizer}
    cell = a_cell("estimate", model, method, chosen, config, settings, **values)
    request = {"verb": "estimate", "cell": cell.model_dump(mode="json"), "profile": chosen, "allocator": allocator}
    answer = ask(request, progress(quiet))
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print("\n".join(lines(answer, by_default=profile is None)))
    raise typer.Exit(OVER_BUDGET if fail_if_too_big and not answer["fits"] else DONE)


def a_cell(
    verb: str,
    model: str,
    method: str,
    profile: str,
    config: list[str] | None,
    settings: list[str] | None,
    **values: Any,
) -> Cell:
    """The cell that the command line of `verb` names, checked as a suite's is. Raises UserError."""
    from meftbench.plan.profiles import PREDICTED, find_profile
    from meftbench.plan.suite import cell_of

    find_profile(profile, f"{verb}: profile")
    named = {"model": {"name": model, "config": pairs("--config", config)}, "device": PREDICTED + profile}
    named |= {"method": {"name": method, **pairs("--set", settings)}}
    return cell_of(verb, named | {key: value for key, value in values.items() if value is not None})


def pairs(option: str, given: list[str] | None) -> dict[str, Any]:
    """Keys and values of `key=value`, read as YAML reads them. Raises UserError."""
    import yaml

    found = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(option, f"{text!r} is no setting", "write key=value")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(option, f"{value!r} is no value", "write a number, a word or true") from None
    return found


def progress(quiet: bool) -> Callable[[str], None]:
    """Prints a line on stderr, or does not."""
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def lines(answer: dict[str, Any], by_default: bool = False) -> list[str]:
    """The answer for people: every number with its unit, and where it comes from."""
    from meftbench.units import format_bytes, format_duration

    def held(text: str, nbytes: int, about: str = "") -> str:
        return f"  {text:<22}{format_bytes(nbytes):>12}  predicted{f', {about}' if about else ''}"

    default = " (the default: choose with --profile)" if by_default else ""
    device = f"{answer['device']}, {format_bytes(answer['memory_bytes'])}"
    found = [answer["label"], f"on {device}, profile {answer['profile']}{default}"]
    found += [] if answer["verified"] else ["not validated on this device"]
    found += [
        held("peak allocated", answer["peak_allocated_bytes"], f"in {answer['peak_phase']}"),
        held("peak reserved", answer["peak_reserved_bytes"], "by torch's allocator"),
        held("process", answer["process_device_bytes"], f"context of {format_bytes(answer['context_bytes'])} included"),
        f"  {verdict(answer)}",
        "breakdown of the peak allocated",
        *(held(name.replace("optimizer", "optimizer state"), size) for name, size in _largest(answer["breakdown"])),
        "training step",
        held("activation peak", answer["activation_peak_bytes"], "forward and backward above the level before"),
        f"  {'parameters':<22}{answer['parameters_trainable']:,} trained of {answer['parameters_total']:,}, counted",
        f"  {'attention':<22}{', '.join(answer['attention'])}, predicted",
        f"predicted in {format_duration(answer['predict_s'])} with {format_bytes(answer['host_bytes'])} of host memory",
    ]
    return found


def verdict(answer: dict[str, Any]) -> str:
    from meftbench.units import format_bytes

    if not answer["fits"]:
        missing = max(-answer["headroom_bytes"], 0)
        return f"does not fit: {format_bytes(missing)} too much, predicted"
    if answer["headroom_bytes"] < 0:
        return f"fits only as torch gives back what it has cached: {answer['retries']} times, predicted"
    return f"fits, headroom {format_bytes(answer['headroom_bytes'])}, predicted"


def _largest(breakdown: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, size) for name, size in breakdown.items() if size), key=lambda item: -item[1])
