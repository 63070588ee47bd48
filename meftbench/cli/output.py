"""All that commands print: on stdout their answer, on stderr what is said beside it.

What is printed may quote names of files, labels of a run and settings of a suite, which strangers can have written.
The functions here show in it, as escapes, every character that a terminal acts on without showing it. No other module
of the command line prints (tests/cli/test_output.py); tables are printed by `meftbench.report`, which does the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from meftbench.escapes import json_text, visible


def put(*lines: str) -> None:
    """Print the lines on stdout. A line that quotes a path quotes its `path_text`, which has no line ends."""
    print(*map(visible, lines), sep="\n")


def put_json(content: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> None:
    """Print one JSON value on stdout. default: makes JSON of what `json` does not know."""
    print(json_text(json.dumps(content, ensure_ascii=False, indent=indent, default=default)))


def put_error(*lines: str) -> None:
    """Print the lines on stderr, at once."""
    print(*map(visible, lines), sep="\n", file=sys.stderr, flush=True)
