"""The trace of a memory snapshot, replayed by the rules of torch's allocator: do they say what the device did, and what
would other settings have reserved?

Every stream has an allocator of its own: torch never gives a free block of one stream to another. Private pools (of
CUDA graphs and of MemPool) are not replayed; their bytes are in the levels as the trace has them. How many addresses
are left behind an expandable segment is not recorded: where a free block is larger than they are, torch may choose
another block than the rules do here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from meftbench.snapshots.placed_allocator import Action, PlacedAllocator
from meftbench.snapshots.ranges import Range, Ranges
from meftbench.snapshots.snapshot import DEFAULT_POOL, DeviceSnapshot, Entry
from meftbench.snapshots.state import Held, Live, State, state_before

_MAX_RESUMPTIONS = 200  # each takes as long as reading the whole state


class Allocation(NamedTuple):
    """One allocation of a trace. requested: bytes.  born, freed: numbers of the entries; None: not freed in it."""

    requested: int
    born: int
    freed: int | None


def allocations(trace: Sequence[Entry]) -> list[Allocation]:
    """The allocations of a trace in order. One is freed when that is requested, even if another stream uses it."""
    found: list[Allocation] = []
    at: dict[int, int] = {}
    for number, entry in enumerate(trace):
        if entry.action == "alloc":
            at[entry.address] = len(found)
            found.append(Allocation(entry.size, number, None))
        elif (
            entry.action in ("free_requested", "free_completed") and (index := at.pop(entry.address, None)) is not None
        ):
            found[index] = found[index]._replace(freed=number)
    return found


class Moment(NamedTuple):
    """Bytes at one moment. allocated: of the blocks handed out, as wholes (memory_allocated).  requested: of the
    requests in them.  reserved: of what is taken from the device (memory_reserved)."""

    allocated: int
    requested: int
    reserved: int


@dataclass
class Replay:
    """A trace in lock-step with the allocator's rules.

    allocations: that the trace has, but for those in private pools (`private`).  agreeing: of them, those for which the
    rules chose torch's address, and took from the device what torch took.  first_difference: the number of the first
    entry where they did not.
    before: the level before the first entry.  after: after each entry; what is reserved is measured.
    replayed_reserved_peak, replayed_reserved: by the rules; None where they differed too often to go on.
    sizes: bytes of the block that each allocation got, by the number of its entry.
    """

    before: Moment
    allocations: int = 0
    private: int = 0
    agreeing: int = 0
    first_difference: int | None = None
    after: list[Moment] = field(default_factory=list)
    replayed_reserved_peak: int | None = None
    replayed_reserved: int | None = None
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def levels(self) -> list[int]:
        """Bytes of the blocks handed out, after each entry of the trace."""
        return [level.allocated for level in self.after]

    def peak(self, name: str) -> int:
        """The most that was "allocated", "requested" or "reserved", before the trace or in it."""
        return max(int(getattr(level, name)) for level in [self.before, *self.after])

    @property
    def peak_at(self) -> int:
        """The number of the first entry after which the most is allocated; -1: that is before the trace."""
        peak = self.peak("allocated")
        return -1 if self.before.allocated == peak else self.levels.index(peak)

    @property
    def fragmentation(self) -> float:
        """1 - allocated / reserved, for the most that was allocated while reserved memory was at its peak."""
        peak = self.peak("reserved")
        allocated = max(level.allocated for level in [self.before, *self.after] if level.reserved == peak)
        return 1 - allocated / peak if peak else 0.0


def replay(snapshot: DeviceSnapshot, state: State | None = None) -> Replay:
    """The trace, every allocation at the address that the rules choose, held against torch's.

    state: `state_before(snapshot)`, if it is there already; it is left as it is.
    Raises UserError as `state_before` does.
    """
    return _LockStep(snapshot, state or state_before(snapshot)).run()


class _LockStep:
    def __init__(self, snapshot: DeviceSnapshot, state: State) -> None:
        self.snapshot, self.state = snapshot, state
        self.sizes = PlacedAllocator(snapshot.settings)  # for its rules of sizes
        self.segments: Ranges[Held] = Ranges()
        self.live: Ranges[Live] = Ranges()
        for segment in state.segments:
            self.segments.add(*segment)
        for block in state.live:
            live = block.item
            self.live.add(block.start, block.end, Live(live.size, live.requested, live.awaiting))
        self.streams: dict[int, PlacedAllocator] = {}
        self.taken: list[Action] = []  # what torch took from the device since the last allocation
        self.gave_back = False  # whether torch gave memory back since the last allocation or free
        self.resumptions = 0
        self.private_reserved = sum(s.end - s.start for s in state.segments if s.item.pool != DEFAULT_POOL)
        for stream in sorted({s.item.stream for s in state.segments if s.item.pool == DEFAULT_POOL}):
            self._resume(stream)
        in_use = [block.item for block in self.live if not block.item.awaiting]
        self.level = Moment(
            allocated=sum(live.size for live in in_use),
            requested=sum(live.requested for live in in_use),
            reserved=sum(segment.end - segment.start for segment in self.segments),
        )
        self.found = Replay(self.level)

    def run(self) -> Replay:
        found = self.found
        peak = self._replayed()
        for number, entry in enumerate(self.snapshot.trace):
            allocated, requested, reserved = self.level
            if entry.action == "alloc":
                allocated, requested = allocated + self._alloc(number, entry), requested + entry.size
                peak = max(peak, self._replayed())
            elif entry.action in ("free_requested", "free_completed"):
                self.gave_back = False
                live = self._free(number, entry)
                if live is not None:
                    allocated, requested = allocated - live.size, requested - live.requested
            elif entry.action.startswith("segment_"):
                reserved += self._device(number, entry)
            elif entry.action == "oom" and self.taken:
                # Pages that were mapped before the device was full stay mapped.
                self._resume(entry.stream)
                self.taken.clear()
                self.gave_back = False
            self.level = Moment(allocated, requested, reserved)
            found.after.append(self.level)
        if self.resumptions <= _MAX_RESUMPTIONS:
            found.replayed_reserved_peak, found.replayed_reserved = peak, self._replayed()
        return found

    def _replayed(self) -> int:
        return self.private_reserved + sum(allocator.reserved for allocator in self.streams.values())

    def _alloc(self, number: int, entry: Entry) -> int:
        """The size of the block that the allocation gets."""
        agrees = True
        if number in self.state.private:
            self.found.private += 1
            size = self.sizes.round_size(entry.size)
        else:
            self.found.allocations += 1
            allocator = self.streams.get(entry.stream) or self._allocator(entry.stream, [])
            allocator.actions.clear()
            # On a full device torch has found no free block before it gave memory back, and does not search again.
            allocator.searches_free_blocks = not (self.gave_back and self.taken)
            block = allocator.malloc(entry.size)
            allocator.searches_free_blocks = True
            assert block is not None, "there is no capacity here"
            agrees = block.address == entry.address and allocator.actions == self.taken
            size = block.size if agrees else self.sizes.round_size(entry.size)
            self.found.agreeing += agrees
        self.found.sizes[number] = size
        self.live.add(entry.address, entry.address + size, Live(size, entry.size, False))
        if not agrees:
            self._differs(number)
            self._resume(entry.stream)
        self.taken.clear()
        self.gave_back = False
        return size

    def _free(self, number: int, entry: Entry) -> Live | None:
        """The block that is no longer in use, unless that was said before."""
        block = self.live.at(entry.address)
        if block is None:
            return None
        live = block.item
        was_awaiting, live.awaiting = live.awaiting, True
        if entry.action == "free_completed":
            self.live.remove(entry.address)
            segment = self.segments.covering(entry.address)
            if number not in self.state.private and segment is not None:
                allocator = self.streams.get(segment.item.stream)
                held = allocator.live.get(entry.address) if allocator else None
                if allocator is not None and held is not None:
                    allocator.free(held)
        return None if was_awaiting else live

    def _device(self, number: int, entry: Entry) -> int:
        """The bytes that an entry segment_* adds to what is reserved."""
        parts = self.state.segments_of[number]
        private = number in self.state.private
        if entry.action in ("segment_alloc", "segment_map"):
            for part in parts:
                self.segments.add(*part)
            if not private:
                self.taken.append((entry.action, entry.address, entry.size))
            change = entry.size
        else:
            self.segments.cut(entry.address, entry.address + entry.size)
            if not private:
                self._release(number, entry)
            change = -entry.size
        if private:
            self.private_reserved += change
        return change

    def _release(self, number: int, entry: Entry) -> None:
        self.gave_back = True
        if self.taken:
            # Pages were mapped, the device was full before there were enough of them, and torch gives back what it can.
            self._resume(entry.stream)
            self.taken.clear()
            return
        allocator = self.streams.get(entry.stream)
        if allocator is None or not allocator.release(entry.action, entry.address, entry.size):
            self._differs(number)
            self._resume(entry.stream)

    def _differs(self, number: int) -> None:
        if self.found.first_difference is None:
            self.found.first_difference = number

    def _resume(self, stream: int) -> None:
        """Give the stream an allocator with the memory that it holds now by the trace: after a difference, all that
        follows is held against torch again."""
        if stream in self.streams:
            self.resumptions += 1
            if self.resumptions > _MAX_RESUMPTIONS:
                return
        self._allocator(stream, [s for s in self.segments if s.item.stream == stream and s.item.pool == DEFAULT_POOL])

    def _allocator(self, stream: int, segments: list[Range[Held]]) -> PlacedAllocator:
        lowest = {small: address for (of, small), address in self.state.lowest.items() if of == stream}
        allocator = PlacedAllocator(
            self.snapshot.settings, segments, _within(self.live, segments), lowest, self._address_of
        )
        self.streams[stream] = allocator
        return allocator

    def _address_of(self, size: int) -> int | None:
        """Where the driver put the segment that torch took at this point."""
        return next(
            (address for action, address, taken in self.taken if action != "segment_alloc" or taken == size), None
        )


def _within(live: Iterable[Range[Live]], segments: list[Range[Held]]) -> list[Range[Live]]:
    """The blocks that lie in the segments; both in order of address."""
    inside: list[Range[Live]] = []
    index = 0
    for block in live:
        while index < len(segments) and segments[index].end <= block.start:
            index += 1
        if index < len(segments) and segments[index].start <= block.start:
            inside.append(block)
    return inside
