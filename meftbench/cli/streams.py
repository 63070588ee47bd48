"""Standard output and error: characters that they cannot encode, and pipes that are closed by their reader."""

from __future__ import annotations

import codecs
import os
import sys

# Characters in the program's output, and how they are written in ASCII where the encoding lacks them.
_SPELLED = {
    "×": "x", "±": "+-", "∞": "inf", "λ": "lambda", "Λ": "Lambda", "β": "beta", "→": "->", "…": "...", "—": "-",
    "–": "-", "·": "-", "²": "^2", "⁻": "^-", "≤": "<=", "≥": ">=", "−": "-", "‑": "-", "\u00a0": " ", "\u202f": " ",
}  # fmt: skip


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """An error handler for codecs: ASCII from `_SPELLED`, or a JSON escape (\\uXXXX), so that JSON stays valid."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    units = memoryview(text.encode("utf-16-be", "surrogatepass")).cast("B")
    if all(sign in _SPELLED for sign in text):
        return "".join(_SPELLED[sign] for sign in text), error.end
    escaped = (f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
    return "".join(escaped), error.end


def encode_anything() -> None:
    """Make stdout and stderr replace characters that their encoding lacks (`_spelled`) in place of raising an error."""
    codecs.register_error("meftbench", _spelled)
    for stream in (sys.stdout, sys.stderr):
        # Objects that replace a stream, as in tests, take any character.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="meftbench")


def flush() -> None:
    """Write out what was printed, while an error can still be reported. stdout is None if closed from the start."""
    if sys.stdout is not None:
        sys.stdout.flush()


def abandon_stdout() -> None:
    """Discard all further output, also what is still buffered and written when the process ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
