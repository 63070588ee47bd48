"""Texts for rich, through which tables and answers reach the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from meftbench.escapes import visible

if TYPE_CHECKING:
    from rich.console import OverflowMethod
    from rich.text import Text


def text_of(text: str, style: str = "", overflow: OverflowMethod | None = None) -> Text:
    """A text in which what a record, a file or a suite holds cannot act on the terminal, and is no markup.

    All that is printed with rich is made here (tests/cli/test_output.py).
    """
    from rich.text import Text

    return Text(visible(text), style=style, overflow=overflow)


# Behind these a long name may go on in the next line: rather between its parts than between the words of one.
_PARTS, _WORDS = re.compile(r"(?<=[./,:=+])(?=[^./,:=+])"), re.compile(r"(?<=_)(?=[^_])")


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters: broken at spaces, and a word that is longer, such as the name of
    a module, behind an underscore or a full stop where it has one."""
    lines = [""]
    for word in text.split(" "):
        parts = [word] if len(word) <= width else _PARTS.split(word)
        pieces = [piece for part in parts for piece in ([part] if len(part) <= width else _WORDS.split(part))]
        before = " " if lines != [""] else ""
        for piece in pieces:
            if len(lines[-1] + before + piece) <= width:
                lines[-1] += before + piece
            else:
                lines += [piece[start : start + width] for start in range(0, len(piece), width)] or [""]
            before = ""
    return "\n".join(lines).removeprefix("\n")
