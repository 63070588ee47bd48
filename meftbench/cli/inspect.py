"""`meftbench inspect`: what a memory snapshot of torch tells, and what other allocator settings would have reserved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meftbench.cli.estimate import folded
from meftbench.cli.options import AsJson, Quiet, progress, say_next
from meftbench.cli.output import put, put_json
from meftbench.errors import UserError
from meftbench.escapes import path_text

# Named and not imported here: it runs in a process of its own, with a limit on its memory, and needs no torch.
_REQUESTS = "meftbench.snapshots.inspection"


def inspect(
    snapshot: Annotated[
        Path, typer.Argument(metavar="SNAPSHOT", help="What torch.cuda.memory._dump_snapshot(FILE) wrote.")
    ],
    device: Annotated[int | None, typer.Option(min=0, help="Of which GPU, where it has several.")] = None,
    alloc_confs: Annotated[
        list[str] | None,
        typer.Option("--alloc-conf", metavar="TEXT", help="What if: settings as in PYTORCH_ALLOC_CONF; repeatable."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="What if: the device lets the process reserve this much, 24GiB."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PNG|SVG|PDF", help="Draw memory over the trace.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a memory SNAPSHOT of torch shows: peaks, what lived at the peak, and what other settings would reserve.

    Its trace is replayed by the rules of torch's CUDA allocator. No GPU is needed, and nothing in the file is run.
    """
    from meftbench.report.views.snapshot import snapshot_lines
    from meftbench.runner.predictions import ask

    kind = None if output is None else _kind_of(output)
    request = {
        "file": str(snapshot),
        "device": device,
        "alloc_confs": alloc_confs,
        "capacity": None if memory is None else _capacity(memory),
    }
    answer = ask("inspect", request, progress(quiet), requests=_REQUESTS)
    if as_json:
        put_json(answer)
    else:
        put(*folded(snapshot_lines(answer)))
    if output is not None and kind is not None:
        from meftbench.report.views.snapshot import snapshot_picture

        _write(output, snapshot_picture(answer, kind))
        progress(quiet)(f"{path_text(output)}: written")
    shape = ("--batch-size", "N", "--sequence-length", "N")
    say_next(("validate", snapshot, "MODEL", "METHOD", *shape), as_json=as_json)


def _kind_of(output: Path) -> str:
    from meftbench.report.views.snapshot import FORMATS

    kind = output.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserError(str(output), "is not the name of a figure", "end it in .png, .svg or .pdf")
    return kind


def _capacity(text: str) -> int:
    from meftbench.units import parse_bytes

    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        what, _, cure = str(error).partition("; ")
        raise UserError("--memory", what, cure) from None
    if nbytes <= 0:
        raise UserError("--memory", f"{text!r} is no memory", "write 24GiB")
    return nbytes


def _write(output: Path, content: bytes) -> None:
    from meftbench.records.store import write_named

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_named(output, content)
    except OSError as error:
        raise UserError(str(output), f"cannot be written ({error.strerror})", "choose another with -o") from None
