"""Text from records, files and messages, made safe to show: one place for every kind of output.

A run may come from somebody else's pull request, so its labels and messages may hold anything: escape sequences that
recolour a terminal or move its cursor, marks that reverse the order of letters, formulas for spreadsheets, and markup.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable
from os import PathLike

# White space that is kept beside spaces.
_SEPARATORS = frozenset("\n\t")
_TO_LOOK_AT = re.compile(r"[^ -~\n\t]")  # all but ASCII that is always shown as it is
_FORMULA = re.compile(r"[=+\-@\t\r]")


def visible(text: str) -> str:
    """The text with every control, formatting and unassigned character shown as an escape, such as `\\x1b`, `\\u202e`.

    Those are the characters that a terminal or a browser acts on without showing them: escape sequences, carriage
    returns, marks of writing direction, zero-width characters. Line ends, tabs and all kinds of spaces are kept.
    """
    if text.isprintable() or not _TO_LOOK_AT.search(text):
        return text
    return _by_line(text, _escape)


def single_line(text: str) -> str:
    """The text as `visible` shows it, on one line: runs of white space are one space."""
    if text.isprintable() and "  " not in text and text == text.strip():
        return text
    return " ".join(visible(text.replace("\r\n", "\n")).split())


def path_text(path: PathLike[str] | str) -> str:
    """A path as `visible` shows it, on one line: its spaces are kept, its line ends and tabs are escapes, too."""
    return visible(os.fspath(path)).replace("\n", "\\n").replace("\t", "\\t")


def json_text(text: str) -> str:
    """JSON of which the strings hold invisible characters as `\\u` escapes: the same JSON, safe on a terminal."""
    if text.isascii() and "\x7f" not in text:  # JSON has the other control characters as escapes already
        return text
    return _by_line(text, _json_escape)


def spreadsheet_text(text: str) -> str:
    """The text as a field of a CSV file that no spreadsheet takes for a formula: `'=1+1`.

    A number stays as it is. Source: OWASP, "CSV Injection".
    """
    if not _FORMULA.match(text) or _is_number(text):
        return text
    return f"'{text}"


def _by_line(text: str, escape: Callable[[str], str]) -> str:
    """The text with `escape` of each character that is not shown. Only lines that have one are read by character: of
    tables of thousands of cells these are few."""
    return "\n".join(
        line if line.isprintable() else "".join(sign if _is_shown(sign) else escape(sign) for sign in line)
        for line in text.split("\n")
    )


def _is_shown(sign: str) -> bool:
    return sign.isprintable() or sign in _SEPARATORS or unicodedata.category(sign) == "Zs"


def _escape(sign: str) -> str:
    code = ord(sign)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(sign: str) -> str:
    return "\\u007f" if sign == "\x7f" else json.dumps(sign)[1:-1]  # two escapes above U+FFFF


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
