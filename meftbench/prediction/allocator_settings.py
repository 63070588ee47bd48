"""The settings in PYTORCH_ALLOC_CONF that decide how much memory torch reserves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from meftbench.errors import UserError, unknown
from meftbench.units import MiB

LARGE_SEGMENT = 20 * MiB
MIN_LARGE_REQUEST = 10 * MiB  # kMinLargeAlloc
INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: [1 MiB, 2 MiB), [2 MiB, 4 MiB) ... [32 GiB, ∞)

_WHERE = "PYTORCH_ALLOC_CONF"
_PAIR = re.compile(r"([^,:\[\]]+):(\[[^\]]*\]|[^,:\[\]]*)(?:,|$)")


@dataclass(frozen=True)
class AllocatorSettings:
    """The settings of torch's CUDA caching allocator that decide what it reserves. All sizes in bytes.

    max_split_size: free blocks of at least this many bytes are never split; None: no limit.
    garbage_collection_threshold: share of `capacity` above which unused segments are given back before new ones are
        allocated; 0: off. Without a capacity it is off, too (torch collects only where
        set_per_process_memory_fraction was called).
    capacity: bytes that the device lets this process reserve; None: no limit.
    large_segment_size: of the segment for a request between 1 and 10 MiB, and of a page of an expandable large pool.
        A setting of torch 2.13 (`large_segment_size_mb`); in 2.6 a constant of 20 MiB, which is still the default.
    max_non_split_rounding_size: how much larger than its request an unsplittable block may be; None: as much as
        large_segment_size.
    roundup_power2_divisions: each of 16 octaves, from [1 MiB, 2 MiB) on, is divided into so many steps, to which
        requests are rounded up; 0 or 1: steps of 512 bytes. Requests below 1 MiB take the number of the first octave.

    Source: torch 2.13 c10/core/AllocatorConfig.h and .cpp.
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    garbage_collection_threshold: float = 0
    capacity: int | None = None
    large_segment_size: int = LARGE_SEGMENT
    max_non_split_rounding_size: int | None = None
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS

    @staticmethod
    def parse(text: str) -> AllocatorSettings:
        """The settings of "expandable_segments:True,max_split_size_mb:128"; "" is torch's default.

        A key given twice takes its last value, as in torch. Keys that do not affect reserved memory (pinned host
        memory, `release_lock_on_cudamalloc`) and other backends are rejected, since the replay does not model them.

        Raises UserError for whatever torch 2.13 rejects, and for the keys above.
        """
        texts = dict(_pairs(re.sub(r"\s", "", text)))
        for key in texts:
            if key not in _READERS:
                raise unknown(_WHERE, "allocator setting", key, _READERS)
        values = {field: reader(key, texts[key]) for key, (field, reader) in _READERS.items() if key in texts}
        settings = AllocatorSettings(**values)  # type: ignore[arg-type]
        for key, size in (
            ("max_split_size_mb", settings.max_split_size),
            ("max_non_split_rounding_mb", settings.max_non_split_rounding_size),
        ):
            if size is not None and size < settings.large_segment_size:
                raise _rejected(key, texts[key], f"at least {settings.large_segment_size // MiB}, a large segment")
        return settings


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs, position = [], 0
    while position < len(text):
        match = _PAIR.match(text, position)
        if match is None:
            raise UserError(_WHERE, f"{text[position:]!r} is not a setting", "write key:value,key:value")
        pairs.append((match[1], match[2]))
        position = match.end()
    return pairs


def _rejected(key: str, value: str, expected: str) -> UserError:
    return UserError(_WHERE, f"{key} is {value!r}", f"write {expected}")


def _boolean(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise _rejected(key, value, "True or False")
    return value == "True"


def _mebibytes(key: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value):
        raise _rejected(key, value, "a whole number of MiB")
    return int(value) * MiB


def _large_segment(key: str, value: str) -> int:
    size = _mebibytes(key, value)
    if size <= MIN_LARGE_REQUEST:
        raise _rejected(key, value, f"more than {MIN_LARGE_REQUEST // MiB}")
    return size


def _threshold(key: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value) or not 0 < float(value) < 1:
        raise _rejected(key, value, "a number between 0 and 1")
    return float(value)


def _power_of_2(key: str, value: str, zero: bool = False) -> int:
    number = int(value) if re.fullmatch("[0-9]{1,9}", value) else -1
    if number < (0 if zero else 1) or number & (number - 1):
        raise _rejected(key, value, "a power of 2, or [MiB:power of 2,...,>:power of 2]")
    return number


def _divisions(key: str, value: str) -> tuple[int, ...]:
    if not value.startswith("["):
        return (_power_of_2(key, value),) * INTERVALS
    divisions, last = [0] * INTERVALS, -1
    for boundary, count in _pairs(value[1:-1]):
        steps = _power_of_2(key, count, zero=True)
        if boundary == ">":
            divisions[last + 1 :] = [steps] * (INTERVALS - last - 1)
            continue
        index = min(_power_of_2(key, boundary).bit_length() - 1, INTERVALS - 1)
        if last < 0:
            divisions[:index] = [steps] * index
        divisions[index] = steps
        last = index
    return tuple(divisions)


_READERS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "expandable_segments": ("expandable_segments", _boolean),
    "max_split_size_mb": ("max_split_size", _mebibytes),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold),
    "large_segment_size_mb": ("large_segment_size", _large_segment),
    "max_non_split_rounding_mb": ("max_non_split_rounding_size", _mebibytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
}
