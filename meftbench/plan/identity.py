"""Stable names for content: the same facts give the same id on every machine and in every version."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spaces; equal content gives equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(content: Any) -> str:
    """16 hexadecimal digits (64 bits) of BLAKE2b over the canonical JSON of `content`."""
    return hashlib.blake2b(canonical(content).encode(), digest_size=8).hexdigest()


def place(path: str) -> str:
    """One text for one folder or file, however its path is spelled: from the working folder on where it lies in it,
    which is the same in every copy of a repository; else its real absolute path."""
    real, here = Path(path).expanduser().resolve(), Path.cwd().resolve()
    return f"./{real.relative_to(here).as_posix()}" if real.is_relative_to(here) else str(real)


def uuid7() -> str:
    """A time-ordered UUID (RFC 9562, version 7); Python has its own only from 3.14."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = (milliseconds & (2**48 - 1)) << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0b10 << 62
    return str(uuid.UUID(int=value | random & (2**62 - 1)))
