"""Stable ids: equal content has the same id on every machine and in every version."""

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
    """The same text for the same folder or file, however its path is written. Inside the working folder it is relative
    to that folder, so that it is the same in every copy of a repository; elsewhere it is the real absolute path."""
    real, working_folder = Path(path).expanduser().resolve(), Path.cwd().resolve()
    return f"./{real.relative_to(working_folder).as_posix()}" if real.is_relative_to(working_folder) else str(real)


def uuid7() -> str:
    """A time-ordered UUID (RFC 9562, version 7), which Python's `uuid` has only from 3.14 on."""
    milliseconds = time.time_ns() // 1_000_000
    random_bits = int.from_bytes(os.urandom(10))
    value = (milliseconds & (2**48 - 1)) << 80 | 0x7 << 76 | (random_bits >> 68 & 0xFFF) << 64 | 0b10 << 62
    return str(uuid.UUID(int=value | random_bits & (2**62 - 1)))
