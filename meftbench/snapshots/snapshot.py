"""The content of a memory snapshot of torch, checked and typed. All sizes and addresses are in bytes.

Source: torch 2.13 torch/cuda/memory.py, torch/cuda/_memory_viz.py and torch/csrc/cuda/memory_snapshot.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from meftbench.prediction.allocator_settings import AllocatorSettings

CURE = "write it anew with torch.cuda.memory._dump_snapshot(FILE)"
DEFAULT_POOL = (0, 0)


class Frame(NamedTuple):
    """One line of a stack. name: of the function."""

    filename: str
    line: int
    name: str


Frames = tuple[Frame, ...]  # the innermost first


class HeldBlock(NamedTuple):
    """A block of a segment at the end. state: "allocated", "awaiting" (freed, but another stream may use it), "free".

    requested: bytes of the request that it serves, or has served last.
    """

    address: int
    size: int
    requested: int
    state: str
    frames: Frames


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory taken from the device; of an expandable segment, one range without a gap.

    small: serves requests of up to 1 MiB.  pool: (0, 0), or the id of a private pool (of a CUDA graph, a MemPool).
    """

    device: int
    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    pool: tuple[int, int]
    blocks: tuple[HeldBlock, ...]


class Entry(NamedTuple):
    """What the allocator did: one of `ACTIONS`. size: as requested (alloc, free_*, oom), or of the memory taken from or
    given back to the device (segment_*).

    address: 0 of a snapshot; of an oom, the bytes that were free on the device.  pool: None where it is not recorded.
    """

    action: str
    address: int
    size: int
    stream: int
    time_us: int | None
    frames: Frames
    pool: tuple[int, int] | None


ACTIONS = (
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
    "snapshot",
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """settings: with which it was recorded.  traces: by device; a device without memory has neither.
    predicted: it is from `meftbench export`, and not from a device."""

    settings: AllocatorSettings
    segments: tuple[Segment, ...]
    traces: Mapping[int, tuple[Entry, ...]]
    predicted: bool = False

    @property
    def devices(self) -> list[int]:
        """The devices of which it has a segment or a trace."""
        return sorted({segment.device for segment in self.segments} | {*self.traces})


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """What a snapshot has of one device: the segments at the end by address, and the trace in order of time."""

    settings: AllocatorSettings
    device: int
    segments: tuple[Segment, ...]
    trace: tuple[Entry, ...]
    predicted: bool = False
