"""torch's CUDA caching allocator without a device: the same rules applied to made-up addresses, for one stream.

Methods are named as in torch's c10/cuda/CUDACachingAllocator.cpp, so that the two can be read side by side. They follow
two versions of it, one of 2024 and one of late 2025, and the headers of torch 2.13: with torch's default settings all
decide alike. Older ones have no `large_segment_size_mb`, and fail where expandable segments are combined with
max_split_size or garbage collection.

Not modelled: at which address the driver places a segment (here: after all others), which only decides between free
blocks of equal size; other streams, for whose events a freed block waits; private pools of CUDA graphs and MemPool.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meftbench.prediction.allocator_settings import INTERVALS, MIN_LARGE_REQUEST, AllocatorSettings
from meftbench.prediction.blocks import ADDRESS_BITS, Block, Pool
from meftbench.units import MiB

MIN_BLOCK = 512  # kMinBlockSize
SMALL_REQUEST = 1 * MiB  # kSmallSize
SMALL_SEGMENT = 2 * MiB  # kSmallBuffer
ROUND_LARGE = 2 * MiB  # kRoundLarge
UNLIMITED = 1 << 62
FIRST_ADDRESS = 0x7F00_0000_0000  # resembles addresses that the driver returns
ADDRESS_SPACE = 1 << 44  # bytes of addresses of an expandable segment where there is no capacity

Record = Callable[[str, int, int, Block | None], None]


@dataclass
class Levels:
    """Bytes of the blocks that are handed out, of the requests for them, and of the segments."""

    allocated: int
    requested: int
    reserved: int

    def raise_to(self, allocated: int, requested: int, reserved: int) -> None:
        if allocated > self.allocated:
            self.allocated = allocated
        if requested > self.requested:
            self.requested = requested
        if reserved > self.reserved:
            self.reserved = reserved


class CachingAllocator:
    """Hands out and takes back blocks as torch would, and keeps its statistics. All sizes in bytes.

    window: the highest levels since `begin_window` (torch's reset_peak_memory_stats).
    record: called as record(action, address, size, block) for each action of torch's memory history but "alloc".
    """

    def __init__(self, settings: AllocatorSettings, record: Record | None = None) -> None:
        self.settings = settings
        self.record = record
        self.capacity = UNLIMITED if settings.capacity is None else settings.capacity
        self.max_split = UNLIMITED if settings.max_split_size is None else settings.max_split_size
        self.max_rounding = settings.max_non_split_rounding_size or settings.large_segment_size
        self.collects = settings.garbage_collection_threshold > 0 and settings.capacity is not None
        self.small = Pool(True, SMALL_SEGMENT)
        self.large = Pool(False, settings.large_segment_size)
        self.live: dict[int, Block] = {}  # by address
        self._rounded: dict[int, int] = {}  # of requests
        self.next_address = FIRST_ADDRESS
        self.requested = self.allocated = self.reserved = 0
        self.requested_peak = self.allocated_peak = self.reserved_peak = 0
        self.window = Levels(0, 0, 0)
        self.allocated_at_reserved_peak = 0  # the most while `reserved` was at its peak
        self.device_allocs = self.retries = 0

    def begin_window(self) -> Levels:
        """The highest levels of the window that ends here; another begins at the present levels."""
        ended, self.window = self.window, Levels(self.allocated, self.requested, self.reserved)
        return ended

    def malloc(self, nbytes: int) -> Block | None:
        """A block for a request of `nbytes` > 0; None: out of memory, even after everything unused was given back."""
        size = self._rounded.get(nbytes) or self.round_size(nbytes)
        pool = self.small if size <= SMALL_REQUEST else self.large
        block = self.get_free_block(pool, size)
        if block is None:
            if self.collects:
                self.garbage_collect_cached_blocks()
            block = self.alloc_block(pool, size)
            if block is None and self.release_available_cached_blocks(pool, size):
                block = self.alloc_block(pool, size)
            if block is None:
                self.release_cached_blocks()
                self.retries += 1
                block = self.alloc_block(pool, size)
            if block is None:
                self._recorded("oom", self.capacity - self.reserved, size)
                return None
        if block.size != size and self.should_split(block, size):
            remainder, block = block, Block(block.address, size, pool, block.segment)
            block.insert_before(remainder)
            remainder.address += size
            remainder.size -= size
            remainder.born = pool.searches
            place = remainder.size << ADDRESS_BITS | remainder.address  # as `Pool.insert`, which takes longer to call
            insort(pool.order, place)
            pool.at[place] = remainder
        block.allocated = True
        block.requested = nbytes
        self.live[block.address] = block
        self.requested += nbytes
        self.allocated += block.size
        window = self.window  # compared here, not in a method: this runs hundreds of thousands of times in a prediction
        if self.requested > window.requested:
            window.requested = self.requested
            if self.requested > self.requested_peak:
                self.requested_peak = self.requested
        if self.allocated > window.allocated:
            window.allocated = self.allocated
            if self.allocated > self.allocated_peak:
                self.allocated_peak = self.allocated
        if self.reserved > window.reserved:
            window.reserved = self.reserved
        if self.reserved == self.reserved_peak and self.allocated > self.allocated_at_reserved_peak:
            self.allocated_at_reserved_peak = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Takes a block back and merges it with its free neighbours."""
        if self.record is not None:
            self.record("free_requested", block.address, block.requested, block)
            self.record("free_completed", block.address, block.requested, block)
        del self.live[block.address]
        self.requested -= block.requested
        self.allocated -= block.size
        block.allocated = False
        block.requested = 0
        pool = block.pool
        if block.previous is not None and not block.previous.allocated:
            self.merge(block, block.previous)
        if block.following is not None and not block.following.allocated:
            self.merge(block, block.following)
        block.born = pool.searches
        place = block.size << ADDRESS_BITS | block.address
        insort(pool.order, place)
        pool.at[place] = block

    def free_blocks(self) -> tuple[object, ...]:
        """Sizes and addresses of the free blocks, the unmapped ranges, and bytes in use and reserved."""
        pools = [(tuple(pool.order), tuple(pool.unmapped)) for pool in (self.small, self.large)]
        return (*pools, self.allocated, self.reserved, self.next_address)

    def segments(self) -> Iterator[list[Block]]:
        """The blocks of each segment, by address; of an expandable segment, those of each range without a gap."""
        blocks = [*self.live.values(), *self.small.at.values(), *self.large.at.values()]
        for head in sorted(blocks, key=lambda block: block.address):
            if head.previous is None or not head.previous.mapped:
                contiguous, block = [], head
                while block is not None and block.mapped:
                    contiguous.append(block)
                    block = block.following  # type: ignore[assignment]
                yield contiguous

    # Sizes.

    def round_size(self, nbytes: int) -> int:
        octave = min(max(nbytes.bit_length() - 21, 0), INTERVALS - 1)
        divisions = self.settings.roundup_power2_divisions[octave]
        if divisions > 1 and nbytes > MIN_BLOCK * divisions:
            step = (1 << nbytes.bit_length() - 1) // divisions
            size = -(-nbytes // step) * step
        else:
            size = max(MIN_BLOCK, -(-nbytes // MIN_BLOCK) * MIN_BLOCK)
        self._rounded[nbytes] = size
        return size

    def get_allocation_size(self, size: int) -> int:
        if size <= SMALL_REQUEST:
            return SMALL_SEGMENT
        if size < MIN_LARGE_REQUEST:
            return self.settings.large_segment_size
        return -(-size // ROUND_LARGE) * ROUND_LARGE

    def should_split(self, block: Block, size: int) -> bool:
        remainder = block.size - size
        if block.pool.small or self.settings.expandable_segments:
            return remainder >= MIN_BLOCK
        return size < self.max_split and remainder > SMALL_REQUEST

    # Finding a block, and making one.

    def get_free_block(self, pool: Pool, size: int) -> Block | None:
        pool.searches += 1
        order = pool.order
        index = bisect_left(order, size << ADDRESS_BITS)
        if index == len(order):
            return None
        block = pool.at[order[index]]
        if block.segment is not None:
            # Best fit by the size a block could grow to, so that the one at the growing end is the last to be split.
            while index + 1 < len(order):
                next_block = pool.at[order[index + 1]]
                if _expandable_size(next_block) >= _expandable_size(block):
                    break
                block, index = next_block, index + 1
        if size < self.max_split <= block.size:
            return None
        if size >= self.max_split and block.size >= size + self.max_rounding:
            return None
        del pool.at[order.pop(index)]
        return block

    def alloc_block(self, pool: Pool, size: int) -> Block | None:
        segment = self.get_allocation_size(size)
        # torch holds a whole segment against set_per_process_memory_fraction, even if fewer pages are needed.
        if self.reserved + segment > self.capacity:
            return None
        if self.settings.expandable_segments:
            return self.try_allocate_expandable_block(pool, size)
        block = Block(self.place(segment), segment, pool)
        self._reserve(segment, "segment_alloc", block.address)
        return block

    def place(self, size: int) -> int:
        """The address of a new segment, for which the device has `size` bytes of addresses: after all others."""
        address = self.next_address
        self.next_address += size
        return address

    def _reserve(self, size: int, action: str, address: int) -> None:
        self.device_allocs += 1
        self.reserved += size
        if self.reserved > self.reserved_peak:
            self.reserved_peak = self.reserved
            self.allocated_at_reserved_peak = self.allocated
        self._recorded(action, address, size)

    def _recorded(self, action: str, address: int, size: int) -> None:
        if self.record is not None:
            self.record(action, address, size, None)

    def merge(self, block: Block, neighbour: Block | None) -> None:
        """try_merge_blocks: `block`, in no pool, takes in a free neighbour; both are mapped, or both are not."""
        if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
            return
        block.pool.erase(neighbour)
        if block.previous is neighbour:
            block.address = neighbour.address
            block.previous = neighbour.previous
            if neighbour.previous is not None:
                neighbour.previous.following = block
        else:
            block.following = neighbour.following
            if neighbour.following is not None:
                neighbour.following.previous = block
        block.size += neighbour.size

    # Giving memory back to the device.

    def garbage_collect_cached_blocks(self) -> None:
        """Give back unused large segments, of at least average age first, down to the threshold."""
        excess = self.reserved - int(self.settings.garbage_collection_threshold * self.capacity)
        if excess <= 0:
            return
        unsplit = [block for block in self.large.blocks() if not block.is_split]
        total_age = sum(self.large.searches - block.born for block in unsplit)
        count, reclaimed, freed = len(unsplit), 0, True
        while reclaimed < excess and freed and count > 0:
            average, freed = total_age / count, False
            for block in self.large.blocks():
                block_age = self.large.searches - block.born
                if not block.is_split and block.segment is None and block_age >= average:
                    freed = True
                    reclaimed += block.size
                    total_age -= block_age
                    count -= 1
                    self.release_block(block)

    def release_available_cached_blocks(self, pool: Pool, size: int) -> bool:
        """Where max_split_size is set: give back one block that is large enough, or several, largest first.

        Returns whether that suffices for `size`.
        """
        if self.settings.max_split_size is None:
            return False
        needed = max(size, self.max_split)
        index = pool.first_of(needed)
        if index < len(pool.order) and (block := pool.at[pool.order[index]]).segment is None:
            self.release_block(block)
            return True
        released = 0
        for block in reversed(pool.blocks()[:index]):
            if released >= needed or block.size < self.max_split:
                break
            if block.segment is None:
                released += block.size
                self.release_block(block)
        return released >= needed

    def release_cached_blocks(self) -> None:
        for pool in (self.large, self.small):
            for block in pool.blocks():
                if block.segment is not None:
                    self.unmap_block(block, block.segment)
                elif not block.is_split:
                    self.release_block(block)

    def release_block(self, block: Block) -> None:
        block.pool.erase(block)
        self.reserved -= block.size
        self._recorded("segment_free", block.address, block.size)

    # Expandable segments: one a pool, mapped page by page.

    def find_expandable_block(self, pool: Pool, size: int) -> Block:
        """The lowest free or unmapped block from which on `size` bytes of addresses are not handed out; if there is
        none, that of a new segment."""
        for address in pool.unmapped:
            start = pool.unmapped_at[address]
            if start.previous is not None and not start.previous.allocated:
                start = start.previous
            available, block = 0, start
            while available < size and block is not None and not block.allocated:
                available += block.size
                block = block.following  # type: ignore[assignment]
            if available >= size:
                return start
        # Addresses for 1 1/8 of the device's memory, so that pages can be mapped anew at the end.
        space = ADDRESS_SPACE if self.settings.capacity is None else self.capacity + self.capacity // 8
        space = -(-max(space, size) // pool.page) * pool.page
        address = self.place(space)
        new_segment = Block(address, space, pool, address)
        new_segment.mapped = False
        pool.insert(new_segment)
        return new_segment

    def try_allocate_expandable_block(self, pool: Pool, size: int) -> Block | None:
        block = self.find_expandable_block(pool, size)
        if not block.mapped and not self.map_block(block, min(block.size, size)):
            return None
        while block.size < size:
            unmapped = block.following
            assert unmapped is not None, "the block found has room"
            if not self.map_block(unmapped, min(size - block.size, unmapped.size)):
                return None
            block = unmapped
        pool.erase(block)
        return block

    def map_block(self, block: Block, size: int) -> bool:
        """Map the first `size` bytes of an unmapped block, rounded up to pages; they are free. False: out of memory."""
        pool = block.pool
        mapped = -(-size // pool.page) * pool.page
        if self.reserved + mapped > self.capacity:
            return False
        pool.erase(block)
        block.mapped = True
        if mapped < block.size:
            remainder = Block(block.address + mapped, block.size - mapped, pool, block.segment)
            remainder.mapped = False
            remainder.insert_after(block)
            pool.insert(remainder)
            block.size = mapped
        address = block.address
        self.merge(block, block.previous)
        self.merge(block, block.following)
        pool.insert(block)
        self._reserve(mapped, "segment_map", address)
        return True

    def unmap_block(self, block: Block, segment: int) -> None:
        """Give back the pages that lie wholly in a free block of the expandable segment at address `segment`."""
        pool, page = block.pool, block.pool.page
        start = segment - (segment - block.address) // page * page
        end = segment + (block.address + block.size - segment) // page * page
        if start >= end:
            return
        pool.erase(block)
        if start > block.address:
            before = Block(block.address, start - block.address, pool, segment)
            before.insert_before(block)
            pool.insert(before)
        if block.address + block.size > end:
            after = Block(end, block.address + block.size - end, pool, segment)
            after.insert_after(block)
            pool.insert(after)
        block.address, block.size, block.mapped = start, end - start, False
        self.merge(block, block.previous)
        self.merge(block, block.following)
        if block.is_split:
            pool.insert(block)  # otherwise nothing of the segment is left, and its addresses are given up, too
        self.reserved -= end - start
        self._recorded("segment_unmap", start, end - start)


def _expandable_size(block: Block) -> int:
    """Size of a free block together with the unmapped range behind it, into which it could grow."""
    following = block.following
    return block.size + (following.size if following is not None and not following.mapped else 0)
