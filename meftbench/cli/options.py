"""Options that several verbs have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from meftbench.errors import UserError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `meftbench run` wrote.")]


def emit(text: str, output: Path | None) -> None:
    """Print, or write to a file (a name of `-` is stdout). Raises UserError where it cannot be written."""
    if output is None or str(output) == "-":
        print(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(str(output), f"cannot be written ({error.strerror})", "choose another --output") from None
    print(f"{output}: written", file=sys.stderr)
