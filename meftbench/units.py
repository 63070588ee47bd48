"""Bytes and durations as text that people read and write. Stored values are always in bytes and seconds."""

from __future__ import annotations

import math
import re

KiB, MiB, GiB = 2**10, 2**20, 2**30

_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": 2**40,
}
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "24GiB" (2³⁰), "24GB" (10⁹), "512 MiB", or a bare count of bytes.

    Raises ValueError, with the accepted units: it is not such a text. A number without a unit has to be an int.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _QUANTITY.fullmatch(str(text))
    if not match or match[2].lower() not in _BYTES:
        raise ValueError(f"{text!r} is not an amount of memory; write 412MiB, 24GiB (2^30) or 24GB (10^9)")
    count = float(match[1]) * _BYTES[match[2].lower()]
    if math.isinf(count):
        raise ValueError("an amount of memory of more than 300 digits")
    return round(count)


_REQUESTED = re.compile(r"[Tt]ried to allocate ([0-9.]+ ?(?:bytes|B|KiB|MiB|GiB|TiB))")


def requested_bytes(message: str) -> int | None:
    """The bytes that were requested, from the out-of-memory message of a torch allocator; None where it has none."""
    match = _REQUESTED.search(message)
    return parse_bytes(match[1].replace("bytes", "B")) if match else None


def parse_duration(text: str | int | float) -> float:
    """Seconds of "600s", "10m", "1.5h", "250ms", or a bare number of seconds. Raises ValueError: it is neither."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    match = _QUANTITY.fullmatch(str(text))
    if not match or match[2].lower() not in _SECONDS:
        raise ValueError(f"{text!r} is not a duration; write 600s, 10m or 1h")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_bytes(count: float) -> str:
    """A count of bytes as text, in the binary unit that leaves one to four digits before the point.

    >>> format_bytes(412 * 2**20)
    '412.0 MiB'
    """
    for unit, size in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(count) >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} B"


def format_duration(seconds: float) -> str:
    """A duration as text: "850 ms", "12.3 s", "4m 05s", "2h 03m"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds_left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {seconds_left:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
