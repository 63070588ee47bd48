"""Checks that an unpickled object has the form of a torch memory snapshot, and makes it a typed one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NoReturn

from meftbench.errors import UserError
from meftbench.prediction.allocator_settings import INTERVALS, AllocatorSettings
from meftbench.snapshots.snapshot import (
    ACTIONS,
    CURE,
    DEFAULT_POOL,
    Entry,
    Frame,
    Frames,
    HeldBlock,
    Segment,
    Snapshot,
)
from meftbench.units import MiB

_LARGEST = 2**62  # of addresses and lines
_MOST_BYTES = 2**48  # of one block or request: no GPU has so many
_DEEPEST = 4096  # frames of a stack; torch's have some hundred at most
_MAX_DEVICES = 1024
_OCTAVES = {str(1 << octave): octave for octave in range(INTERVALS)}  # named by their first size in MiB
_STATES = {
    "active_allocated": "allocated",
    "active_awaiting_free": "awaiting",
    "active_pending_free": "awaiting",  # its name where C++ writes the snapshot
    "inactive": "free",
}


def checked_snapshot(content: object, where: str) -> Snapshot:
    """The snapshot in an unpickled object. where: named in errors. Raises UserError: it has another form."""
    return _Reader(where).snapshot(content)


class _Reader:
    """Every method takes an object of any kind and the place it came from, and returns the typed object or raises.

    No method looks deeper than a snapshot is nested, and no list or dictionary of the file is read twice: a few bytes
    of a pickle can refer to the same list a million times.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.read: dict[int, object] = {}  # by id; the objects are held so that no id is used again
        self.frames_of: dict[int, tuple[object, Frames]] = {}
        self.frame_of: dict[int, tuple[object, Frame]] = {}

    def fail(self, what: str, cure: str = CURE) -> NoReturn:
        raise UserError(self.where, f"is not a memory snapshot: {what}", cure)

    def once(self, value: object, place: str) -> None:
        if id(value) in self.read:
            self.fail(f"{place} occurs twice")
        self.read[id(value)] = value

    def mapping(self, value: object, place: str) -> Mapping[object, object]:
        if type(value) is not dict:
            self.fail(f"{place} is {_kind(value)}, and not a dictionary")
        self.once(value, place)
        return value

    def sequence(self, value: object, place: str) -> list[object]:
        if type(value) is not list:
            self.fail(f"{place} is {_kind(value)}, and not a list")
        if value:
            self.once(value, place)
        return value

    def number(self, of: Mapping[object, object], key: str, place: str, default: int | None = None) -> int:
        """A whole number from 0 on; `default` where the key is absent."""
        value = of.get(key, default)
        if type(value) is not int:
            self.fail(f"{place} has {_kind(value)} as {key}" if key in of else f"{place} has no {key}")
        if not 0 <= value < (_MOST_BYTES if "size" in key else _LARGEST):
            self.fail(f"{place} has a {key} of {value}" if abs(value) < 2**70 else f"{place} has a {key} out of range")
        return value

    def word(self, of: Mapping[object, object], key: str, place: str) -> str:
        value = of.get(key)
        if type(value) is not str:
            self.fail(f"{place} has {_kind(value)} as {key}" if key in of else f"{place} has no {key}")
        return value

    def flag(self, of: Mapping[object, object], key: str, place: str) -> bool:
        value = of.get(key, False)
        if type(value) is not bool:
            self.fail(f"{place} has {_kind(value)} as {key}")
        return value

    def snapshot(self, content: object) -> Snapshot:
        whole = self.mapping(content, "the pickle")
        for key in ("segments", "device_traces"):
            if key not in whole:
                self.fail(f"it has no {key}")
        segments = [
            self.segment(value, f"segment {index}")
            for index, value in enumerate(self.sequence(whole["segments"], "segments"))
        ]
        traces = self.sequence(whole["device_traces"], "device_traces")
        if len(traces) > _MAX_DEVICES:
            self.fail(f"it has traces of {len(traces)} devices")
        by_device = {
            device: tuple(self.entry(value, f"entry {index} of device {device}") for index, value in enumerate(trace))
            for device, trace in enumerate(self.sequence(trace, "a trace") for trace in traces)
            if trace
        }
        settings = self.settings(whole.get("allocator_settings", {}))
        return Snapshot(settings, tuple(segments), by_device, "predicted_by" in whole)

    def segment(self, value: object, place: str) -> Segment:
        raw = self.mapping(value, place)
        address, size = self.number(raw, "address", place), self.number(raw, "total_size", place)
        kind = self.word(raw, "segment_type", place)
        if kind not in ("small", "large"):
            self.fail(f"{place} has a segment_type of {_shown(kind)}")
        blocks, position = [], address
        for index, block in enumerate(self.sequence(raw.get("blocks"), f"blocks of {place}")):
            blocks.append(self.block(block, f"block {index} of {place}", position))
            position += blocks[-1].size
        if position != address + size:
            self.fail(f"{place} has {size} bytes, and its blocks {position - address}")
        device = self.number(raw, "device", place, 0)
        if device >= _MAX_DEVICES:
            self.fail(f"{place} is of device {device}")
        return Segment(
            device=device,
            address=address,
            size=size,
            stream=self.number(raw, "stream", place, 0),
            small=kind == "small",
            expandable=self.flag(raw, "is_expandable", place),
            pool=self.pool(raw.get("segment_pool_id", DEFAULT_POOL), place),
            blocks=tuple(blocks),
        )

    def block(self, value: object, place: str, position: int) -> HeldBlock:
        raw = self.mapping(value, place)
        address, size = self.number(raw, "address", place, position), self.number(raw, "size", place)
        if address != position:
            self.fail(f"{place} is at address {address}, and the one before it ends at {position}")
        if not size:
            self.fail(f"{place} has a size of 0")
        state = self.word(raw, "state", place)
        if state not in _STATES:
            self.newer(f"{place} has the state {_shown(state)}")
        requested = self.number(raw, "requested_size", place, size)
        if _STATES[state] != "free" and requested > size:
            self.fail(f"{place} has {size} bytes for a request of {requested}")
        return HeldBlock(address, size, requested, _STATES[state], self.frames(raw.get("frames"), place))

    def entry(self, value: object, place: str) -> Entry:
        raw = self.mapping(value, place)
        action = self.word(raw, "action", place)
        if action not in ACTIONS:
            self.newer(f"{place} has the action {_shown(action)}")
        if action == "snapshot":
            address, size = 0, 0
        else:
            address = self.number(raw, "device_free" if action == "oom" else "addr", place)
            size = self.number(raw, "size", place)
        if not size and action.startswith("segment_"):
            self.fail(f"{place} has a size of 0")
        pool = raw.get("pool_id")
        time_us = raw.get("time_us")
        if time_us is not None and (type(time_us) is not int or abs(time_us) >= _LARGEST):
            self.fail(f"{place} has {_kind(time_us)} as time_us")
        return Entry(
            action,
            address,
            size,
            self.number(raw, "stream", place, 0),
            time_us,
            self.frames(raw.get("frames"), place),
            None if pool is None else self.pool(pool, place),
        )

    def newer(self, what: str) -> NoReturn:
        cure = "it may be from a newer torch: read it with a newer meftbench, or with pytorch.org/memory_viz"
        raise UserError(self.where, f"{what}, which is not known here", cure)

    def pool(self, value: object, place: str) -> tuple[int, int]:
        if isinstance(value, tuple | list) and len(value) == 2:
            first, second = value
            if type(first) is int and type(second) is int and max(abs(first), abs(second)) < _LARGEST:
                return first, second
        self.fail(f"{place} has {_kind(value)} as the id of its pool")

    def frames(self, value: object, place: str) -> Frames:
        """A stack, which snapshots of torch share between the entries of one line of code."""
        if value is None:
            return ()
        if id(value) in self.frames_of:
            return self.frames_of[id(value)][1]
        if type(value) is not list:
            self.fail(f"{place} has {_kind(value)} as frames")
        if len(value) > _DEEPEST:
            self.fail(f"{place} has a stack of {len(value):,} frames, and {_DEEPEST:,} is more than torch writes")
        frames = tuple(self.frame(frame, f"a frame of {place}") for frame in value)
        self.frames_of[id(value)] = value, frames
        return frames

    def frame(self, value: object, place: str) -> Frame:
        if id(value) in self.frame_of:
            return self.frame_of[id(value)][1]
        if type(value) is not dict:
            self.fail(f"{place} is {_kind(value)}, and not a dictionary")
        line = value.get("line", 0)
        if type(line) is not int or abs(line) >= _LARGEST:
            self.fail(f"{place} has {_kind(line)} as line")
        frame = Frame(self.word(value, "filename", place), line, self.word(value, "name", place))
        self.frame_of[id(value)] = value, frame
        return frame

    def settings(self, value: object) -> AllocatorSettings:
        place = "allocator_settings"
        raw = self.mapping(value, place)
        split = raw.get("max_split_size", -1)
        threshold = raw.get("garbage_collection_threshold", 0.0)
        if type(split) is not int:
            self.fail(f"{place} has {_kind(split)} as max_split_size")
        if threshold != 0 and (type(threshold) is not float or not 0 < threshold < 1):
            self.fail(f"{place} has no share between 0 and 1 as garbage_collection_threshold")
        divisions = [0] * INTERVALS
        for key, steps in self.mapping(raw.get("roundup_power2_divisions", {}), f"{place}: divisions").items():
            octave = _OCTAVES.get(key) if type(key) is str else None
            if octave is None or type(steps) is not int or not 0 <= steps <= 2**20 or steps & (steps - 1):
                self.fail(f"{place} has roundup_power2_divisions that torch does not have")
            divisions[octave] = steps
        defaults = AllocatorSettings()
        confs = [raw.get(key) for key in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")]
        texts = [conf for conf in confs if type(conf) is str]
        large = _mebibytes(texts, "large_segment_size_mb")
        return AllocatorSettings(
            expandable_segments=self.flag(raw, "expandable_segments", place),
            max_split_size=split if 0 < split < _LARGEST else None,
            garbage_collection_threshold=threshold if type(threshold) is float else 0.0,
            large_segment_size=large or defaults.large_segment_size,
            max_non_split_rounding_size=_mebibytes(texts, "max_non_split_rounding_mb"),
            roundup_power2_divisions=tuple(divisions),
        )


def _mebibytes(texts: list[str], key: str) -> int | None:
    """A setting that torch 2.13 has in the text of the settings alone, in bytes."""
    for text in texts:
        if found := re.search(rf"{key}\s*:\s*([1-9][0-9]{{0,6}})\b", text):
            return int(found[1]) * MiB
    return None


def _kind(value: object) -> str:
    """What something is, without its content, which may be of any depth and length."""
    if value is None:
        return "nothing"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {
        "int": "a number",
        "float": "a fraction",
        "str": "a text",
        "dict": "a dictionary",
        "bool": "a truth value",
    }.get(type(value).__name__, f"a {type(value).__name__}")


def _shown(text: str) -> str:
    """A text of the file in one short line, without control characters."""
    return ascii(text[:40])
