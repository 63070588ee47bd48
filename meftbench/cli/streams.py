"""Standard output and error: what they cannot encode is spelled out, and what becomes of a pipe that ends."""

from __future__ import annotations

import codecs
import os
import sys

# Signs of our tables, in letters that every encoding has.
_SPELLED = {
    "×": "x", "±": "+-", "∞": "inf", "λ": "lambda", "Λ": "Lambda", "β": "beta", "→": "->", "…": "...", "—": "-",
    "–": "-", "·": "-", "²": "^2", "⁻": "^-", "≤": "<=", "≥": ">=", "−": "-", "‑": "-", "\u00a0": " ", "\u202f": " ",
}  # fmt: skip


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """A handler of codecs: a spelling, or an escape as JSON has it, so that JSON stays JSON."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    units = memoryview(text.encode("utf-16-be", "surrogatepass")).cast("B")
    if all(sign in _SPELLED for sign in text):
        return "".join(_SPELLED[sign] for sign in text), error.end
    escaped = (f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
    return "".join(escaped), error.end


def encode_anything() -> None:
    """Whatever a terminal's encoding lacks is written otherwise, and never an error."""
    codecs.register_error("meftbench", _spelled)
    for stream in (sys.stdout, sys.stderr):
        # A stand-in for a stream, as tests have, takes all.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="meftbench")


def flush() -> None:
    """What was printed is written now, where an error is still told. Closed from the start, it goes nowhere."""
    if sys.stdout is not None:
        sys.stdout.flush()


def abandon_stdout() -> None:
    """Nothing more is written there, at the end of the process either."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
