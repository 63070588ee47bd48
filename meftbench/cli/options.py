"""Options and helpers that several commands have in common."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from meftbench.cli import completion
from meftbench.cli.output import put, put_error, put_json
from meftbench.errors import UserError
from meftbench.escapes import path_text, single_line
from meftbench.plan.axes import AXES
from meftbench.plan.defaults import PROFILE

MOST_JOBS = 1024  # processes at a time
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A folder that `meftbench run` wrote.", autocompletion=completion.runs)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Take up what the same command had found when it was interrupted.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# --- options of the commands that predict ---

Model = Annotated[
    str,
    typer.Argument(
        help="A name of `meftbench list models`, a hub id, a folder, or MODULE:FUNCTION of your own.",
        autocompletion=completion.models,
    ),
]
Batch = Annotated[str | None, typer.Option(metavar="MODULE:FUNCTION", help=AXES["batch"].help)]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Import and run what is named MODULE:FUNCTION, here or in an installed package.",
    ),
]
Method = Annotated[
    str,
    typer.Argument(
        help="A name of `meftbench list methods`, with levers: lora+checkpoint.", autocompletion=completion.methods
    ),
]
MicroBatchSize = Annotated[int | None, typer.Option(min=1, help=AXES["micro_batch_size"].help)]
Precision = Annotated[str | None, typer.Option(help=AXES["precision"].help, autocompletion=completion.precisions)]
Attention = Annotated[str | None, typer.Option(help=AXES["attention"].help)]
Head = Annotated[str | None, typer.Option(help=AXES["head"].help)]
Packing = Annotated[bool | None, typer.Option("--packing", help=AXES["packing"].help)]
WorldSize = Annotated[int | None, typer.Option(min=1, help=AXES["world_size"].help)]
Parallelism = Annotated[str | None, typer.Option(help=AXES["parallelism"].help)]
Optimizer = Annotated[str | None, typer.Option(help=AXES["optimizer"].help, autocompletion=completion.optimizers)]
Override = Annotated[
    list[str] | None, typer.Option("--config", metavar="KEY=VALUE", help="Overrides the model's configuration.")
]
Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method: adapter_size=8.")
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        help=f"A name of `meftbench list profiles`, or a file. Default: {PROFILE}.", autocompletion=completion.profiles
    ),
]
Allocator = Annotated[str, typer.Option(help="Settings as in PYTORCH_ALLOC_CONF: expandable_segments:True.")]
ForVersions = Annotated[
    str,
    typer.Option(
        metavar="PACKAGE=VERSION,...",
        help="Predict for torch=2.4,transformers=4.48 where a rule is known to differ. Default: the newest.",
    ),
]


def pairs(option: str, texts: list[str] | None) -> dict[str, Any]:
    """Keys and values of texts `key=value`; values are read as YAML. Raises UserError: a text has another form."""
    import yaml

    from meftbench.strict_yaml import parse

    values = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(option, f"{text!r} is no setting", "write key=value")
        try:
            values[key.strip()] = parse(value)
        except yaml.YAMLError:
            raise UserError(option, f"{value!r} is no value", "write a number, a word or true") from None
    return values


# --- output ---


def progress(quiet: bool) -> Callable[[str], None]:
    """A function that prints text on stderr, safe on a terminal; it does nothing if `quiet`."""
    return (lambda text: None) if quiet else put_error


def say(answer: dict[str, Any], as_json: bool, printed: Callable[[dict[str, Any]], None]) -> None:
    """Print an answer: as one JSON object, or by `printed`."""
    if as_json:
        put_json(answer)
    else:
        printed(answer)


def say_written(files: Sequence[Path], as_json: bool, printed: Callable[[], None]) -> None:
    """Say which files were written: as one JSON object, or by `printed`."""
    if as_json:
        put_json({"files": [str(file) for file in files]})
    else:
        printed()


def at_terminal() -> bool:
    """Whether people look at the output: neither stdout nor stderr goes into a pipe or a file, or is closed."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def say_next(*commands: tuple[str | Path, ...], as_json: bool = False) -> None:
    """Say on stderr, at a terminal, what to type next: `next: meftbench report runs/a · meftbench show runs/a CELL`.

    commands: the words behind `meftbench`, quoted for the shell where they need it, the likeliest first; capitals
    stand for what the user fills in.  as_json: the output is one JSON object, and nothing is said.
    Of several those are said that fit the width of the terminal, and always the first.
    """
    if as_json or not at_terminal():
        return
    line, width = "", shutil.get_terminal_size().columns
    for words in commands:
        typed_words = "meftbench " + shlex.join(map(str, words))
        longer = f"{line} · {typed_words}" if line else f"next: {typed_words}"
        if line and len(longer) > width:
            break
        line = longer
    if line:
        put_error(line)


def emit(text: str, output: Path | None) -> None:
    """Print `text`, or write it to the file `output` (`-` is stdout). Raises UserError: it cannot be written."""
    if output is None or str(output) == "-":
        put(text)
        return
    from meftbench.records.store import write_named

    try:
        write_named(output, (text + "\n").encode())
    except OSError as error:
        raise UserError(str(output), f"cannot be written ({error.strerror})", "choose another --output") from None
    put_error(f"{path_text(output)}: written")


def add_to_step_summary(markdown: str, title: str) -> None:
    """Add to the summary of a GitHub job. Where that cannot be written it is said on stderr, and what was found out
    still decides how the command ends."""
    from meftbench.report.render.verdicts import append_step_summary

    try:
        append_step_summary(markdown, title)
    except UserError as error:
        put_error(f"meftbench: {single_line(str(error))}")


def typed(context: typer.Context) -> str:
    """The command and the arguments that the user typed, without --out and --resume, as a line for the shell."""
    parts = [str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in ("out", "resume") or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        for item in value if isinstance(value, list | tuple) else [value]:
            if parameter.param_type_name == "argument":
                parts.append(str(item))
            elif isinstance(item, bool):
                parts.append((parameter.opts if item else parameter.secondary_opts)[0])
            else:
                parts += [parameter.opts[0], str(item)]
    return shlex.join(parts)
