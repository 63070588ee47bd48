"""The memory of a device before a snapshot's trace: what the snapshot has at its end, with the trace undone.

Undone from its last entry to its first, an allocation removes a block, and a free brings one back, at its address. One
thing is not recorded: the rest of up to 1 MiB that stays with a block because it is too small to be split off. Of a
block that was there before the trace and is freed in it, the rest follows from what stood behind the block while it
lived: a free block of a large segment is larger than 1 MiB, so a smaller gap is the block's own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from meftbench.errors import UserError
from meftbench.prediction.caching_allocator import SMALL_REQUEST, SMALL_SEGMENT, CachingAllocator
from meftbench.snapshots.ranges import Range, Ranges
from meftbench.snapshots.snapshot import DEFAULT_POOL, DeviceSnapshot, Entry, Frames


@dataclass(frozen=True, slots=True)
class Held:
    """Of what kind the memory of a segment, or of a mapped range of an expandable one, is."""

    stream: int
    small: bool
    expandable: bool
    pool: tuple[int, int]


@dataclass(slots=True)
class Live:
    """A block that is handed out. All sizes in bytes.

    awaiting: it was freed, but another stream may still use it.  frames: where it was allocated, if that is known.
    ceiling: the lowest address at which another block began behind it, where its size is not yet known; None: it is.
    """

    size: int
    requested: int
    awaiting: bool
    frames: Frames = ()
    ceiling: int | None = None


@dataclass(slots=True)
class State:
    """What a device has before the first entry of a trace.

    segments: what is taken from the device; live: the blocks handed out.
    private: numbers of the trace's entries that belong to private pools.  segments_of: by the number of a segment_*
    entry, what was taken or given back.  lowest: by stream and kind, the lowest address of expandable segments at any
    time.
    """

    segments: Ranges[Held] = field(default_factory=Ranges)
    live: Ranges[Live] = field(default_factory=Ranges)
    private: set[int] = field(default_factory=set)
    segments_of: dict[int, list[Range[Held]]] = field(default_factory=dict)
    lowest: dict[tuple[int, bool], int] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return next(iter(self.segments), None) is None


def state_before(snapshot: DeviceSnapshot, where: str = "snapshot") -> State:
    """The state of the device before the trace.  where: named in errors.

    Raises UserError: the trace does not lead to the segments that the snapshot has, as if entries were missing.
    """
    undoing = _Undoing(snapshot, where)
    for number in range(len(snapshot.trace) - 1, -1, -1):
        undoing.undo(number, snapshot.trace[number])
    return undoing.finished()


class _Undoing:
    def __init__(self, snapshot: DeviceSnapshot, where: str) -> None:
        self.where, self.trace, self.settings = where, snapshot.trace, snapshot.settings
        self.sizes = CachingAllocator(snapshot.settings)  # for its rules of sizes
        # Where no request is recorded (torch can leave out actions), a block is in use until its free is completed. One
        # free alone can also be of a request before the trace.
        actions = Counter(entry.action for entry in snapshot.trace)
        self.requests_recorded = actions["free_requested"] > 0 or actions["free_completed"] <= 1
        self.state = State()
        self.kinds: list[tuple[int, int, bool]] | None = None
        for segment in snapshot.segments:
            held = Held(segment.stream, segment.small, segment.expandable, segment.pool)
            self._hold(segment.address, segment.address + segment.size, held)
            for block in segment.blocks:
                if block.state != "free":
                    live = Live(block.size, block.requested, block.state == "awaiting", block.frames)
                    self.state.live.add(block.address, block.address + block.size, live)

    def undo(self, number: int, entry: Entry) -> None:
        address, live = entry.address, self.state.live
        if entry.action in ("alloc", "free_requested", "free_completed"):
            segment = self.state.segments.covering(address)
            if segment is None:
                raise self._contradiction(number, "is in no segment")
            if segment.item.pool != DEFAULT_POOL:
                self.state.private.add(number)
            if entry.action == "free_completed":
                self._bring_back(number, entry, segment)
                return
            block = live.at(address)
            if block is None:
                raise self._contradiction(number, "is of a block that is not in use after it")
            if entry.action == "alloc":
                live.remove(address)
            else:
                block.item.awaiting = False
        elif entry.action in ("segment_alloc", "segment_map"):
            self._give_back(number, entry)
        elif entry.action in ("segment_free", "segment_unmap"):
            expandable = entry.action == "segment_unmap"
            held = Held(entry.stream, self._is_small(number, entry), expandable, entry.pool or DEFAULT_POOL)
            if not self._hold(address, address + entry.size, held):
                raise self._contradiction(number, "is of memory that is still held after it")
            self.state.segments_of[number] = [Range(address, address + entry.size, held)]
            if held.pool != DEFAULT_POOL:
                self.state.private.add(number)

    def _bring_back(self, number: int, entry: Entry, segment: Range[Held]) -> None:
        """The block at the address of a free, of which the size is known but for an unsplit rest."""
        start = entry.address
        end = start + self.sizes.round_size(entry.size)
        # An expandable segment consists of ranges that adjoin one another.
        if not self.state.live.is_free(start, end) or (end > segment.end and not segment.item.expandable):
            raise self._contradiction(number, "is of a block that overlaps another")
        behind = self.state.live.after(end)
        ceiling = None
        if not segment.item.small and not segment.item.expandable:
            ceiling = segment.end if behind is None else min(segment.end, behind.start)
        awaiting = self.requests_recorded
        self.state.live.add(start, end, Live(end - start, entry.size, awaiting, (), ceiling))
        before = self.state.live.before(start)
        if before is not None and before.item.ceiling is not None:
            before.item.ceiling = min(before.item.ceiling, start)

    def _hold(self, start: int, end: int, held: Held) -> bool:
        if held.expandable:
            kind = (held.stream, held.small)
            self.state.lowest[kind] = min(self.state.lowest.get(kind, start), start)
        return self.state.segments.add(start, end, held)

    def _give_back(self, number: int, entry: Entry) -> None:
        start, end = entry.address, entry.address + entry.size
        if not self.state.live.is_free(start, end):
            raise self._contradiction(number, "takes memory in which a block is in use before it")
        parts = self.state.segments.cut(start, end)
        if not parts:
            raise self._contradiction(number, "takes memory that is not held after it")
        self.state.segments_of[number] = parts
        if parts[0].item.pool != DEFAULT_POOL:
            self.state.private.add(number)

    def _is_small(self, number: int, entry: Entry) -> bool:
        """Whether memory that was given back served small requests: as the blocks did that lay in it; if the trace has
        none, by its size."""
        if self.kinds is None:
            self.kinds = sorted(
                (other.address, index, self.sizes.round_size(other.size) <= SMALL_REQUEST)
                for index, other in enumerate(self.trace)
                if other.action in ("alloc", "free_completed")
            )
        first = bisect_left(self.kinds, (entry.address, 0, False))
        end = bisect_left(self.kinds, (entry.address + entry.size, 0, False))
        for position in range(first, end):
            _, index, small = self.kinds[position]
            if index < number:
                return small
        if entry.action == "segment_unmap":
            return entry.size % self.settings.large_segment_size != 0
        return entry.size == SMALL_SEGMENT

    def finished(self) -> State:
        """The state, in which the blocks whose size was not known have the most likely one."""
        state = self.state
        for block in list(state.live):
            live = block.item
            if live.ceiling is None:
                continue
            rest = live.ceiling - block.end
            splits = live.size < self.sizes.max_split
            if 0 < rest <= (SMALL_REQUEST if splits else self.sizes.max_rounding):
                live.size += rest
                state.live.remove(block.start)
                state.live.add(block.start, block.start + live.size, live)
            live.ceiling = None
        return state

    def _contradiction(self, number: int, what: str) -> UserError:
        entry = self.trace[number]
        text = f"entry {number:,} of the trace ({entry.action} at {entry.address:#x}) {what}: entries are missing"
        cure = "record with every action (no skip_actions), and take the snapshot before the recording ends"
        return UserError(self.where, text, cure)
