"""What torch would have reserved for the trace of a snapshot under other settings of its allocator."""

from __future__ import annotations

from dataclasses import dataclass

from meftbench.prediction.allocator_settings import AllocatorSettings
from meftbench.prediction.blocks import Block
from meftbench.prediction.caching_allocator import CachingAllocator
from meftbench.snapshots.snapshot import DEFAULT_POOL, DeviceSnapshot, Entry
from meftbench.snapshots.state import State


@dataclass(frozen=True)
class WhatIf:
    """The trace under other settings, in bytes or as counts.

    reserved_peak, reserved: the most, and at the end, private pools included as the trace has them.
    retries: how often the device was full and everything unused was given back.
    oom_at: number of the entry that did not fit, where the replay ended (-1: a block that was there before the trace);
    None: everything fits.
    """

    reserved_peak: int
    reserved: int
    retries: int
    oom_at: int | None


def what_if(snapshot: DeviceSnapshot, state: State, settings: AllocatorSettings) -> WhatIf:
    """The trace replayed with `settings`, of which `capacity` is what the device lets the process reserve.

    The blocks that are there before the trace are allocated first, in order of address: in which order they were
    allocated is not known, so a device that is not empty before the trace is less fragmented here than it was.
    Where the trace has an empty_cache(), all that is unused is given back here, too.
    """
    return _WhatIf(snapshot, state, settings).run()


def gives_back_all(trace: tuple[Entry, ...]) -> set[int]:
    """The numbers of entries at which torch.cuda.empty_cache() was called: the first of several segment_free.

    torch also gives memory back in an allocation for which the device is full. If stacks are recorded, they tell which
    it was; if not, every run of such entries counts as empty_cache(), unless the allocation then failed.
    """
    calls: set[int] = set()
    number = 0
    while number < len(trace):
        first = number
        while number < len(trace) and trace[number].action in ("segment_free", "segment_unmap"):
            number += 1
        if number > first:
            names = {frame.name for entry in trace[first:number] for frame in entry.frames}
            named = any("empty_cache" in name or "emptyCache" in name for name in names)
            failed = number < len(trace) and trace[number].action == "oom"
            if named or not (names or failed):
                calls.add(first)
        else:
            number += 1
    return calls


class _Stream(CachingAllocator):
    """The allocator of one stream on a device that others use, too."""

    def __init__(self, settings: AllocatorSettings, streams: dict[int, _Stream]) -> None:
        super().__init__(settings)
        self.streams = streams

    def take_what_others_leave(self) -> None:
        """Set the capacity to that of the device without what the other streams have reserved."""
        if self.settings.capacity is not None:
            others = sum(stream.reserved for stream in self.streams.values() if stream is not self)
            self.capacity = self.settings.capacity - others

    def release_cached_blocks(self) -> None:
        """Of every stream: torch gives back what any of them does not use."""
        for stream in self.streams.values():
            CachingAllocator.release_cached_blocks(stream)
        self.take_what_others_leave()


class _WhatIf:
    def __init__(self, snapshot: DeviceSnapshot, state: State, settings: AllocatorSettings) -> None:
        self.trace, self.state, self.settings = snapshot.trace, state, settings
        self.streams: dict[int, _Stream] = {}
        self.blocks: dict[int, tuple[_Stream, Block]] = {}  # by the address in the trace
        self.private = sum(s.end - s.start for s in state.segments if s.item.pool != DEFAULT_POOL)
        self.peak = self.private

    def run(self) -> WhatIf:
        for place in self.state.live:
            segment = self.state.segments.covering(place.start)
            assert segment is not None, "a block lies in a segment"
            if segment.item.pool == DEFAULT_POOL and not self._alloc(
                segment.item.stream, place.start, place.item.requested
            ):
                return self._result(-1)
        empties = gives_back_all(self.trace)
        for number, entry in enumerate(self.trace):
            if number in empties:
                for stream in self.streams.values():
                    CachingAllocator.release_cached_blocks(stream)
            if number in self.state.private:
                if entry.action.startswith("segment_"):
                    self.private += entry.size if entry.action in ("segment_alloc", "segment_map") else -entry.size
                    self.peak = max(self.peak, self._reserved())
            elif entry.action == "alloc":
                if not self._alloc(entry.stream, entry.address, entry.size):
                    return self._result(number)
            elif entry.action == "free_completed" and entry.address in self.blocks:
                allocator, block = self.blocks.pop(entry.address)
                allocator.free(block)
        return self._result(None)

    def _reserved(self) -> int:
        return self.private + sum(stream.reserved for stream in self.streams.values())

    def _alloc(self, stream: int, address: int, nbytes: int) -> bool:
        if stream not in self.streams:
            self.streams[stream] = _Stream(self.settings, self.streams)
        allocator = self.streams[stream]
        allocator.take_what_others_leave()
        block = allocator.malloc(nbytes)
        if block is None:
            return False
        self.blocks[address] = allocator, block
        self.peak = max(self.peak, self._reserved())
        return True

    def _result(self, oom_at: int | None) -> WhatIf:
        retries = sum(stream.retries for stream in self.streams.values())
        return WhatIf(self.peak, self._reserved(), retries, oom_at)
