"""What torch would reserve on a GPU that is not present: an allocation trace replayed by its allocator's rules.

The rules, and what is not modelled, are in `caching_allocator`; the settings are in `allocator_settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from meftbench.prediction.allocator_settings import AllocatorSettings
from meftbench.prediction.blocks import Block
from meftbench.prediction.caching_allocator import CachingAllocator, Levels, Record

__all__ = ["AllocatorSettings", "Asked", "Event", "Levels", "Replayed", "StepLevels", "replay", "snapshot"]


# Kinds of events that end the first and the second of several rounds that are all alike (loops.py).
ONCE, AGAIN = "once", "again"


class Event(NamedTuple):
    """One entry of a trace, which lists its events in order of time.

    kind: "alloc", "free" or "phase" (a phase of the step begins); ONCE, with the number of storages that a round
        allocates in `nbytes`; AGAIN, with the number of further rounds, which are not in the trace.
    key: identifies the storage (alloc, free). A key may be used again after it was freed.
    nbytes: requested bytes (alloc). A storage of 0 bytes takes no block of the allocator.
    category: what the bytes are, e.g. "activations" (alloc); the name of the phase that begins (phase).
    origin: the operator that allocated them (alloc).
    """

    kind: str
    key: int
    nbytes: int
    category: str = ""
    origin: str = ""


@dataclass
class StepLevels:
    """The allocator's levels in one step. baseline: before it.  phases: the highest, by name of the phase."""

    baseline: Levels
    phases: dict[str, Levels] = field(default_factory=dict)

    @property
    def peak(self) -> Levels:
        """The highest levels of the step."""
        peak = replace(self.baseline)
        for levels in self.phases.values():
            peak.raise_to(levels.allocated, levels.requested, levels.reserved)
        return peak

    @property
    def activation_peak(self) -> int:
        """Bytes allocated in forward and backward above those before the step, at most."""
        return max(self.phases[name].allocated for name in ("forward", "backward")) - self.baseline.allocated


@dataclass
class Replayed:
    """What torch.cuda.memory_stats() would report after the trace, in bytes or as counts.

    allocated_peak: of the blocks handed out (max_memory_allocated): requests rounded up to 512 bytes, and remainders
        that were too small to be split off a block (up to 1 MiB in a large segment).
    requested_peak: of the requests before rounding.
    active_peak: allocated, and freed but still used by another stream. With the one stream here: allocated_peak.
    reserved_peak, reserved: of the segments taken from the device (max_memory_reserved), and reserved at the end.
    fragmentation: 1 - allocated / reserved, for the most that was allocated while reserved memory was at its peak;
        0 if nothing was reserved.
    segments: their number at the end; an expandable one counts once for each range without a gap, as in torch's
        snapshot.
    device_allocs: calls of cudaMalloc, or of cuMemMap for expandable segments.
    retries: how often the device was full and everything unused was given back (num_alloc_retries).
    steps: of each step that was asked for, in order.
    oom: the event that did not fit even after a retry; later events were not replayed. None: everything fits.
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
    steps: list[StepLevels]
    oom: Event | None


_DEFAULT = AllocatorSettings()


FREE, MARK = -1, -2


@dataclass(frozen=True)
class Asked:
    """Events in columns, as the allocator needs them.

    keys: of each.  sizes: of an allocation its bytes, of a free FREE, of any other event MARK.
    marks: numbers of those others, in order.  event: gives the event of a number.
    """

    keys: list[int]
    sizes: list[int]
    marks: list[int]
    event: Callable[[int], Event]

    @classmethod
    def of(cls, events: Sequence[Event]) -> Asked:
        """Raises ValueError: an allocation of a negative size."""
        sizes = []
        for kind, key, nbytes, *_ in events:
            if kind == "alloc" and nbytes < 0:
                raise ValueError(f"storage {key} has {nbytes} bytes")
            sizes.append(nbytes if kind == "alloc" else FREE if kind == "free" else MARK)
        marks = [number for number, size in enumerate(sizes) if size == MARK]
        return cls([event.key for event in events], sizes, marks, events.__getitem__)

    def allocated_before(self, number: int, count: int) -> list[int]:
        """Keys of the last `count` allocations before an event, in order."""
        found: list[int] = []
        while len(found) < count and number > 0:
            number -= 1
            if self.sizes[number] >= 0:
                found.append(self.keys[number])
        return found[::-1]


def replay(
    events: Sequence[Event], settings: AllocatorSettings = _DEFAULT, starts: Sequence[int] = (), settled: int = -1
) -> Replayed:
    """The statistics of torch's allocator after `events`, from an empty device.

    starts: numbers of the events with which a step begins.  settled: number of the event before which
        torch.cuda.empty_cache is called; -1: nowhere.
    Raises ValueError for an invalid trace: a storage that is allocated twice or freed without having been allocated,
    a negative size, an unknown kind of event.
    """
    return replay_asked(Asked.of(events), settings, starts, settled)


def replay_asked(asked: Asked, settings: AllocatorSettings, starts: Sequence[int], settled: int) -> Replayed:
    """As `replay`, of events in columns."""
    allocator = CachingAllocator(settings)
    loop = _Loop(0, 0)
    live: dict[int, Block | None] = {}
    steps: list[StepLevels] = []
    phase = ""
    failed: int | None = None

    def end_phase() -> None:
        ended = allocator.begin_window()
        if steps and phase:
            levels = steps[-1].phases.setdefault(phase, Levels(0, 0, 0))
            levels.raise_to(ended.allocated, ended.requested, ended.reserved)

    begin = 0
    for number in sorted({*asked.marks, *starts, settled, len(asked.keys)} - {-1}):
        failed = _run(asked, begin, number, allocator, live)
        if failed is not None or number == len(asked.keys):
            break
        begin = number
        if number == settled:
            allocator.release_cached_blocks()
        if number in starts:
            end_phase()
            phase = ""
            steps.append(StepLevels(replace(allocator.window)))
        if asked.sizes[number] != MARK:
            continue
        begin += 1
        event = asked.event(number)
        if event.kind == "phase":
            end_phase()
            phase = event.category
        elif event.kind == ONCE:
            loop = _Loop(number + 1, event.nbytes)
            loop.note(allocator, live, asked.allocated_before(number, loop.storages))
        elif event.kind == AGAIN:
            failed = loop.repeated(asked, number, event.nbytes, allocator, live)
            if failed is not None:
                break
        else:
            raise ValueError(f"unknown kind of event {event.kind!r}")
    end_phase()
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
        steps=steps,
        oom=None if failed is None else asked.event(failed),
    )


@dataclass
class _Loop:
    """Rounds of events that are all alike. begin: number of the first event of the second round.  storages: that a
    round allocates.  states: of the allocator, after each round.  counts: of its calls of the device and retries, too,
    of which rounds that leave everything as it was may have some each, where the device is almost full."""

    begin: int
    storages: int
    states: list[tuple[Any, ...]] = field(default_factory=list)

    counts: list[tuple[int, int]] = field(default_factory=list)

    def note(self, allocator: CachingAllocator, live: dict[int, Block | None], last: list[int]) -> None:
        """Keep, after a round, what decides on later blocks (which are free, and where those of the round are that are
        alive) and the counts. last: keys of what the round allocated."""
        blocks = [live.get(key) for key in last]
        places = [block and (block.address, block.size) for block in blocks]
        self.states.append((*allocator.free_blocks(), places))
        self.counts.append((allocator.device_allocs, allocator.retries))

    def repeated(
        self, asked: Asked, end: int, rounds: int, allocator: CachingAllocator, live: dict[int, Block | None]
    ) -> int | None:
        """Carry out the second round `rounds` times more, until the allocator's states repeat themselves: then further
        rounds change nothing. end: number of the event after the round.

        Returns the number of the event that does not fit; None: all do.
        """
        both = asked.allocated_before(end, 2 * self.storages)
        before, last = both[: self.storages], both[self.storages :]
        while rounds:
            self.note(allocator, live, last)
            for ago in range(1, min(_ROUNDS_AGO, len(self.states) - 1) + 1):
                if self.states[-1] == self.states[-1 - ago]:
                    times, rounds = divmod(rounds, ago)
                    (allocs, retries), (allocs_ago, retries_ago) = self.counts[-1], self.counts[-1 - ago]
                    allocator.device_allocs += times * (allocs - allocs_ago)
                    allocator.retries += times * (retries - retries_ago)
                    break
            if not rounds:
                break
            # In a round, storages of the round before have its keys; these are free, as each round frees them.
            for earlier, key in zip(before, last, strict=True):
                if key in live:
                    live[earlier] = live.pop(key)
            if (failed := _run(asked, self.begin, end, allocator, live)) is not None:
                return failed
            rounds -= 1
        return None


_ROUNDS_AGO = 4  # with so many rounds before, the state after a round is compared


def _run(asked: Asked, begin: int, end: int, allocator: CachingAllocator, live: dict[int, Block | None]) -> int | None:
    """Carry out allocations and frees, those of the numbers from `begin` to before `end`. Returns the number of the
    first that does not fit (out of memory); None: all do."""
    malloc, free = allocator.malloc, allocator.free
    number = begin - 1
    for key, size in zip(asked.keys[begin:end], asked.sizes[begin:end], strict=True):
        number += 1  # counted here, since `enumerate` takes longer
        if size == FREE:
            if key not in live:
                raise ValueError(f"storage {key} is freed and was not allocated")
            block = live.pop(key)
            if block is not None:
                free(block)
            continue
        if key in live:
            raise ValueError(f"storage {key} is allocated twice")
        block = malloc(size) if size else None
        if block is None and size:
            return number
        live[key] = block
    return None


def snapshot(events: Iterable[Event], settings: AllocatorSettings = _DEFAULT) -> dict[str, Any]:
    """What torch.cuda.memory._snapshot() would return: pickled, it can be opened at https://pytorch.org/memory_viz.

    Addresses are made up; `time_us` is the position in the trace; each stack has two frames, the operator (its file
    name is the category of its bytes) and the phase. If an event does not fit, an "oom" ends the trace.

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
        address_key = "device_free" if action == "oom" else "addr"
        trace.append(
            {"action": action, address_key: address, "size": size, "stream": 0, "time_us": now, "frames": label}
        )
        if action == "alloc":
            trace[-1]["category"] = event.category

    recorder: Record = record
    allocator = CachingAllocator(settings, recorder)
    live: dict[int, Block | None] = {}
    for now, event in enumerate(events):  # the function `record` above reads both variables
        if event.kind == "phase":
            if phase:
                annotations.append({"name": phase, "stage": "END", "device": 0, "time_us": now})
            phase = event.category
            annotations.append({"name": phase, "stage": "START", "device": 0, "time_us": now})
            continue
        if event.kind not in ("alloc", "free"):
            raise ValueError(f"unknown kind of event {event.kind!r}")
        if event.kind == "alloc":
            frames = [{"name": event.origin or "?", "filename": event.category or "?", "line": 0}]
            if phase:
                frames.append({"name": phase, "filename": "phase", "line": 0})
        if _run(Asked.of([event]), 0, 1, allocator, live) is not None:
            break
        block = live.get(event.key)
        if event.kind == "alloc" and block is not None:
            block.label = frames
            record("alloc", block.address, event.nbytes, block)
    return {
        "segments": [_segment(blocks) for blocks in allocator.segments()],
        "device_traces": [trace],
        "external_annotations": annotations,
        "predicted_by": "meftbench",
        "allocator_settings": {
            "expandable_segments": settings.expandable_segments,
            "max_split_size": -1 if settings.max_split_size is None else settings.max_split_size,
            "garbage_collection_threshold": settings.garbage_collection_threshold,
            "roundup_power2_divisions": {
                str(1 << octave): steps for octave, steps in enumerate(settings.roundup_power2_divisions)
            },
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
