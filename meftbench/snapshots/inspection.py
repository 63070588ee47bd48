"""Everything that `meftbench inspect` prints, from the file of a snapshot. Torch is not imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from meftbench.prediction.allocator_settings import AllocatorSettings
from meftbench.snapshots.file import read_device
from meftbench.snapshots.owners import Owned, bytes_by, owned_blocks, timeline
from meftbench.snapshots.replay import Replay, allocations, replay
from meftbench.snapshots.snapshot import DEFAULT_POOL, DeviceSnapshot
from meftbench.snapshots.state import State, state_before
from meftbench.snapshots.what_if import gives_back_all, what_if
from meftbench.units import format_bytes

MODULES = 8  # lines of the model's code that are named
RESTS = 5
USEFUL = ("", "expandable_segments:True", "max_split_size_mb:128", "roundup_power2_divisions:4")
COLLECTING = "garbage_collection_threshold:0.8"  # has an effect only where the capacity is known


def inspect(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """What a snapshot tells. request: `file`; `device`, a number or None; `alloc_confs`, texts as in
    PYTORCH_ALLOC_CONF, or None for some useful ones; `capacity`, bytes of the device that the process may reserve, or
    None.

    All sizes in the answer are in bytes, and numbers of entries count from 0 (-1: before the first).
    Raises UserError: the file cannot be read, its trace has gaps, or a setting is not one of torch's.
    """
    asked = {conf: AllocatorSettings.parse(conf) for conf in request["alloc_confs"] or ()}
    snapshot = read_device(Path(request["file"]), request["device"])
    state = state_before(snapshot, request["file"])
    tell(f"replaying {len(snapshot.trace):,} entries of the trace")
    replayed = replay(snapshot, state)
    blocks = owned_blocks(snapshot, state, replayed)
    answer: dict[str, Any] = {
        "file": request["file"],
        "device": snapshot.device,
        "entries": len(snapshot.trace),
        "segments": len(snapshot.segments),
        "streams": len({segment.stream for segment in snapshot.segments} | {e.stream for e in snapshot.trace}),
        "source": _source(snapshot),
        "starts_empty": state.is_empty,
        "stacks": any(entry.frames for entry in snapshot.trace)
        or any(block.frames for segment in snapshot.segments for block in segment.blocks),
    }
    answer |= _levels(replayed) | _at_peak(blocks, replayed)
    answer["capacity_bytes"] = request["capacity"]
    answer["other_settings"] = _other_settings(
        snapshot, state, asked or _useful(snapshot, request["capacity"]), request["capacity"], tell
    )
    answer["notes"] = _notes(snapshot, state, replayed)
    answer["timeline"] = timeline(blocks, replayed)
    return answer


def recorded_allocations(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The allocations of a snapshot's trace. request: `file`; `device`, a number or None.

    The answer has `requested`, bytes of each in order; `peak_above_bytes`, the peak allocated above the level before
    the first of them, when a loop has given back the gradients of the step before; `peak_allocated_bytes`, that of the
    whole trace; `starts_empty`, whether nothing is allocated before it.
    Raises UserError: the file cannot be read, or its trace has gaps.
    """
    snapshot = read_device(Path(request["file"]), request["device"])
    state = state_before(snapshot, request["file"])
    tell(f"reading {len(snapshot.trace):,} entries of the trace")
    replayed = replay(snapshot, state)
    requested = allocations(snapshot.trace)
    levels = [replayed.before.allocated, *replayed.levels][requested[0].born if requested else -1 :]
    return {
        "requested": [allocation.requested for allocation in requested],
        "peak_above_bytes": max(levels) - levels[0],
        "peak_allocated_bytes": replayed.peak("allocated"),
        "starts_empty": state.is_empty,
    }


VERBS = {"inspect": inspect, "allocations": recorded_allocations}


def _source(snapshot: DeviceSnapshot) -> str:
    """How the numbers in the snapshot were obtained."""
    return "predicted" if snapshot.predicted else "measured"


def _levels(replayed: Replay) -> dict[str, Any]:
    last = replayed.after[-1] if replayed.after else replayed.before
    return {
        "peak_allocated_bytes": replayed.peak("allocated"),
        "peak_requested_bytes": replayed.peak("requested"),
        "peak_reserved_bytes": replayed.peak("reserved"),
        "peak_at": replayed.peak_at,
        "allocated_bytes": last.allocated,
        "reserved_bytes": last.reserved,
        "fragmentation": replayed.fragmentation,
        "allocations": replayed.allocations,
        "allocations_agreeing": replayed.agreeing,
        "allocations_private": replayed.private,
        "first_difference": replayed.first_difference,
        "replayed_peak_reserved_bytes": replayed.replayed_reserved_peak,
        "replayed_reserved_bytes": replayed.replayed_reserved,
    }


def _at_peak(blocks: list[Owned], replayed: Replay) -> dict[str, Any]:
    peak_at = replayed.peak_at
    alive = [block for block in blocks if block.alive_after(peak_at)]
    rests = Counter(
        (block.size - block.requested, block.requested, block.category, block.where)
        for block in alive
        if block.size > block.requested
    )
    modules = bytes_by(alive, lambda block: block.module)
    rest = modules[MODULES:]
    return {
        "unused_in_blocks_bytes": sum(block.size - block.requested for block in alive),
        "unused_in_blocks": [
            {"unused_bytes": unused, "requested_bytes": requested, "category": kind, "where": where, "blocks": count}
            for (unused, requested, kind, where), count in sorted(rests.items(), reverse=True)[:RESTS]
        ],
        "blocks_at_peak": len(alive),
        "by_category": _rows(bytes_by(alive, lambda block: block.category)),
        "by_module": _rows(modules[:MODULES]),
        "other_modules": {"bytes": sum(size for _, size, _ in rest), "modules": len(rest)},
    }


def _rows(of: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "bytes": size, "blocks": count} for name, size, count in of]


def _useful(snapshot: DeviceSnapshot, capacity: int | None) -> dict[str, AllocatorSettings]:
    """Settings that are worth a look, but for those that were recorded."""
    confs = USEFUL if capacity is None else (*USEFUL, COLLECTING)
    settings = {conf: AllocatorSettings.parse(conf) for conf in confs}
    return {conf: parsed for conf, parsed in settings.items() if parsed != snapshot.settings}


def _other_settings(
    snapshot: DeviceSnapshot,
    state: State,
    asked: dict[str, AllocatorSettings],
    capacity: int | None,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each of the settings. The first, without a text, is of those that were recorded: the others are held
    to it, since it begins with the same blocks in the same order."""
    rows = []
    for conf, settings in [(None, snapshot.settings), *asked.items()]:
        tell(f"replaying with {'the settings as recorded' if conf is None else conf or 'the defaults of torch'}")
        found = what_if(snapshot, state, replace(settings, capacity=capacity))
        rows.append(
            {
                "alloc_conf": conf,
                "peak_reserved_bytes": found.reserved_peak,
                "reserved_bytes": found.reserved,
                "retries": found.retries,
                "oom_at": found.oom_at,
                "collects": None if not settings.garbage_collection_threshold else capacity is not None,
            }
        )
    return rows


def _notes(snapshot: DeviceSnapshot, state: State, replayed: Replay) -> list[str]:
    """What a reader must know of the numbers, a sentence each."""
    trace, source, notes = snapshot.trace, _source(snapshot), []
    if not trace:
        notes.append(
            "there is no trace, so nothing is replayed and the peak is what was allocated at the end: "
            "record one with torch.cuda.memory._record_memory_history()"
        )
    private = [segment for segment in snapshot.segments if segment.pool != DEFAULT_POOL]
    if private or state.private:
        held = format_bytes(sum(segment.size for segment in private))
        counts = f"allocations in them {replayed.private:,}, at the end {held}, {source}"
        notes.append(f"private pools (CUDA graphs, MemPool) are not replayed: {counts}")
    failed = [entry for entry in trace if entry.action == "oom"]
    if failed:
        asked, free = format_bytes(failed[0].size), format_bytes(failed[0].address)
        first = f"first for {asked} with {free} free on the device"
        notes.append(f"allocations for which the device was out of memory: {len(failed):,}, {first}, {source}")
    given_back = ("segment_free", "segment_unmap")
    runs = sum(
        entry.action in given_back and (number == 0 or trace[number - 1].action not in given_back)
        for number, entry in enumerate(trace)
    )
    if runs:
        calls = f"{len(gives_back_all(trace)):,} taken for empty_cache(), and done with other settings, too"
        notes.append(f"times that memory was given back to the device: {runs:,}, {source}; {calls}")
    if trace and not state.is_empty:
        notes.append(
            "the trace begins with memory in use; other settings are replayed from the same blocks, "
            "allocated anew in order of address"
        )
    if any(block.state == "awaiting" for segment in snapshot.segments for block in segment.blocks):
        notes.append("some blocks were freed and wait for another stream at the end; they count as free")
    return notes
