"""What torch would reserve on a GPU that is not there: an allocation trace replayed through its caching allocator.

The rules, with what is not modelled, are in `caching_allocator`; the settings in `allocator_settings`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from meftbench.prediction.allocator_settings import AllocatorSettings
from meftbench.prediction.caching_allocator import Block, CachingAllocator, Record

__all__ = ["AllocatorSettings", "Event", "Replayed", "replay", "snapshot"]


class Event(NamedTuple):
    """One entry of a trace, in the order of time.

    kind: "alloc", "free" or "phase".
    key: which storage (alloc, free). A key may come again after it was freed.
    nbytes: requested bytes (alloc). A storage of no bytes is none to the allocator.
    category: what the bytes are, e.g. "activations" (alloc); the name of the phase that begins (phase).
    origin: the operator that asked for them (alloc).
    """

    kind: str
    key: int
    nbytes: int
    category: str = ""
    origin: str = ""


@dataclass
class Replayed:
    """What torch.cuda.memory_stats() would have said after the trace. Bytes, or counts.

    allocated_peak: of blocks handed out (max_memory_allocated): requests rounded to 512 bytes, and what was left of a
        block but was too little to be split off (up to 1 MiB in a large segment).
    requested_peak: of requests as they were made.
    active_peak: as allocated, with what waits for another stream: on the one stream here, equal to it.
    reserved_peak, reserved: of segments (max_memory_reserved), and at the end.
    fragmentation: 1 - allocated / reserved at the fullest moment at which as much was reserved as ever; 0 of nothing.
    segments: at the end; of an expandable segment, its ranges without a gap (those torch's snapshot lists).
    device_allocs: cudaMallocs, or cuMemMaps of expandable segments.
    retries: how often everything unused was given back because the device was full (num_alloc_retries).
    phase_reserved_peaks: by name, of all the times the phase came; what came before the first phase is in none.
    oom: the event that did not fit even then; what comes after it was not replayed. None: all fits.
    """

    allocated_peak: int
    requested_peak: int
    active_peak: int
    reserved_peak: int
    reserved: int
    fragmentation: float
    segments: int
    device_allocs: int
    retries: int
    phase_reserved_peaks: dict[str, int]
    oom: Event | None


_DEFAULT = AllocatorSettings()


def replay(events: Iterable[Event], settings: AllocatorSettings = _DEFAULT) -> Replayed:
    """The statistics of torch's allocator after `events`, from an empty device.

    Raises ValueError for a trace that is none: a storage that is born twice or dies unborn, a negative size, an
    unknown kind.
    """
    allocator = CachingAllocator(settings)
    live: dict[int, Block | None] = {}
    phase: str | None = None
    phase_peaks: dict[str, int] = {}
    oom = None
    for event in events:
        if event.kind == "phase":
            if phase is not None:
                phase_peaks[phase] = max(phase_peaks.get(phase, 0), allocator.window_peak)
            phase = event.category
            allocator.window_peak = allocator.reserved
        elif not _apply(event, allocator, live):
            oom = event
            break
    if phase is not None:
        phase_peaks[phase] = max(phase_peaks.get(phase, 0), allocator.window_peak)
    peak = allocator.reserved_peak
    return Replayed(
        allocated_peak=allocator.allocated_peak,
        requested_peak=allocator.requested_peak,
        active_peak=allocator.allocated_peak,
        reserved_peak=peak,
        reserved=allocator.reserved,
        fragmentation=1 - allocator.allocated_at_reserved_peak / peak if peak else 0.0,
        segments=sum(1 for _ in allocator.segments()),
        device_allocs=allocator.device_allocs,
        retries=allocator.retries,
        phase_reserved_peaks=phase_peaks,
        oom=oom,
    )


def _apply(event: Event, allocator: CachingAllocator, live: dict[int, Block | None]) -> bool:
    """False: out of memory."""
    if event.kind == "alloc":
        if event.key in live:
            raise ValueError(f"storage {event.key} is allocated twice")
        if event.nbytes < 0:
            raise ValueError(f"storage {event.key} has {event.nbytes} bytes")
        block = allocator.malloc(event.nbytes) if event.nbytes else None
        if block is None and event.nbytes:
            return False
        live[event.key] = block
    elif event.kind == "free":
        if event.key not in live:
            raise ValueError(f"storage {event.key} is freed and was not allocated")
        block = live.pop(event.key)
        if block is not None:
            allocator.free(block)
    else:
        raise ValueError(f"unknown kind of event {event.kind!r}")
    return True


def snapshot(events: Iterable[Event], settings: AllocatorSettings = _DEFAULT) -> dict[str, Any]:
    """What torch.cuda.memory._snapshot() would give: pickled, it opens in https://pytorch.org/memory_viz.

    Addresses are made up; `time_us` is the position in the trace; a stack has two frames, the operator (its file is
    the category of its bytes) and the phase. An event that does not fit is the last, an "oom".

    Raises ValueError as `replay` does.
    Source: torch 2.13 torch/csrc/cuda/memory_snapshot.cpp and torch/cuda/_memory_viz.py.
    """
    trace: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    phase, now = "", 0
    frames: list[dict[str, Any]] = []
    event = Event("phase", 0, 0)

    def record(action: str, address: int, size: int, block: Block | None) -> None:
        label = frames if block is None else block.label
        where = "device_free" if action == "oom" else "addr"
        trace.append({"action": action, where: address, "size": size, "stream": 0, "time_us": now, "frames": label})
        if action == "alloc":
            trace[-1]["category"] = event.category

    recorder: Record = record
    allocator = CachingAllocator(settings, recorder)
    live: dict[int, Block | None] = {}
    for now, event in enumerate(events):  # `record` reads both
        if event.kind == "phase":
            if phase:
                annotations.append({"name": phase, "stage": "END", "device": 0, "time_us": now})
            phase = event.category
            annotations.append({"name": phase, "stage": "START", "device": 0, "time_us": now})
            continue
        if event.kind == "alloc":
            frames = [{"name": event.origin or "?", "filename": event.category or "?", "line": 0}]
            if phase:
                frames.append({"name": phase, "filename": "phase", "line": 0})
        if not _apply(event, allocator, live):
            break
        block = live.get(event.key)
        if event.kind == "alloc" and block is not None:
            block.label = frames
            record("alloc", block.address, event.nbytes, block)
    return {
        "segments": [_segment(blocks) for blocks in allocator.segments()],
        "device_traces": [trace],
        "external_annotations": annotations,
        "allocator_settings": {
            "expandable_segments": settings.expandable_segments,
            "max_split_size": -1 if settings.max_split_size is None else settings.max_split_size,
            "garbage_collection_threshold": settings.garbage_collection_threshold,
        },
    }


def _segment(blocks: list[Block]) -> dict[str, Any]:
    head = blocks[0]
    handed_out = sum(block.size for block in blocks if block.allocated)
    return {
        "device": 0,
        "address": head.address,
        "total_size": sum(block.size for block in blocks),
        "allocated_size": handed_out,
        "active_size": handed_out,
        "requested_size": sum(block.requested for block in blocks),
        "stream": 0,
        "segment_type": "small" if head.pool.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": head.segment is not None,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": "active_allocated" if block.allocated else "inactive",
                "frames": block.label if block.allocated else [],
            }
            for block in blocks
        ],
    }
