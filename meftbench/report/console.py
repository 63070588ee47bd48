"""Texts for rich, through which tables and answers reach the terminal."""

from __future__ import annotations

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
