"""torch's caching allocator for one stream of a real device: it can begin with memory that is already in use, and its
segments lie where the driver put them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meftbench.prediction.allocator_settings import AllocatorSettings
from meftbench.prediction.blocks import Block, Pool
from meftbench.prediction.caching_allocator import ADDRESS_SPACE, FIRST_ADDRESS, CachingAllocator
from meftbench.snapshots.ranges import Range
from meftbench.snapshots.state import Held, Live

Action = tuple[str, int, int]  # what was done, address, bytes


class PlacedAllocator(CachingAllocator):
    """The allocator of one stream.

    segments, live: what it begins with, in order of address.  lowest: by whether it is of the small pool, the first
    address of the expandable segment that it has.  addresses: called with the bytes of a new segment, returns the
    address where the driver puts it, or None.
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        segments: Iterable[Range[Held]] = (),
        live: Iterable[Range[Live]] = (),
        lowest: dict[bool, int] | None = None,
        addresses: Callable[[int], int | None] = lambda size: None,
    ) -> None:
        super().__init__(settings, self._note)
        self.addresses = addresses
        self.actions: list[Action] = []  # on the device, since the list was last cleared
        self.searches_free_blocks = True  # False: torch has searched before it gave memory back, and found none
        self._restore(list(segments), list(live), lowest or {})

    def place(self, size: int) -> int:
        address = self.addresses(size)
        return super().place(size) if address is None else address

    def get_free_block(self, pool: Pool, size: int) -> Block | None:
        return super().get_free_block(pool, size) if self.searches_free_blocks else None

    def release(self, action: str, address: int, size: int) -> bool:
        """Give back what a segment_free or a segment_unmap gave back. False: that is not free as a whole."""
        before = len(self.actions)
        for pool in (self.small, self.large):
            block = pool.free_at(address)
            if action == "segment_free":
                if block is not None and block.size == size and block.segment is None and not block.is_split:
                    self.release_block(block)
                    return True
                continue
            # Pages begin in a block, which is rarely at another address than they are.
            for candidate in [block] if block is not None else pool.blocks():
                end = candidate.address + candidate.size
                if candidate.segment is not None and candidate.address <= address < end:
                    self.unmap_block(candidate, candidate.segment)
                    return self.actions[before:] == [(action, address, size)]
        return False

    def _note(self, action: str, address: int, size: int, block: Block | None) -> None:
        if action.startswith("segment_"):
            self.actions.append((action, address, size))

    # --- the memory it begins with ---

    def _restore(self, segments: list[Range[Held]], live: list[Range[Live]], lowest: dict[bool, int]) -> None:
        self._unplaced = live[::-1]
        self.next_address = max(FIRST_ADDRESS, max((segment.end for segment in segments), default=0))
        expandable: dict[bool, list[Block]] = {}
        ends: dict[bool, int] = {}
        for segment in segments:
            pool = self.small if segment.item.small else self.large
            if not segment.item.expandable:
                self._link(self._blocks(segment.start, segment.end, pool, None))
                continue
            chain = expandable.setdefault(pool.small, [])
            base = lowest.get(pool.small, segment.start)
            position = ends.get(pool.small, base)
            if position < segment.start:
                chain.append(_unmapped(position, segment.start, pool, base))
            chain += self._blocks(max(position, segment.start), segment.end, pool, base)
            # A block may reach into the range behind, which adjoins this one.
            ends[pool.small] = max(segment.end, chain[-1].address + chain[-1].size)
        for small, chain in expandable.items():
            end = ends[small]
            chain.append(_unmapped(end, end + ADDRESS_SPACE, chain[0].pool, chain[0].segment))
            self._link(_merged(chain))
        self.reserved = sum(segment.end - segment.start for segment in segments)
        self.reserved_peak = self.reserved
        self.allocated = sum(block.size for block in self.live.values())
        self.requested = sum(block.requested for block in self.live.values())
        self.allocated_peak, self.requested_peak = self.allocated, self.requested
        self.begin_window()

    def _blocks(self, start: int, end: int, pool: Pool, base: int | None) -> list[Block]:
        """The blocks from `start` to `end`, in order: those handed out, and free ones between them."""
        blocks, position = [], start
        while self._unplaced and self._unplaced[-1].start < end:
            place = self._unplaced.pop()
            if position < place.start:
                blocks.append(Block(position, place.start - position, pool, base))
            block = Block(place.start, place.end - place.start, pool, base)
            block.allocated, block.requested = True, place.item.requested
            self.live[block.address] = block
            blocks.append(block)
            position = place.end
        if position < end:
            blocks.append(Block(position, end - position, pool, base))
        return blocks

    @staticmethod
    def _link(blocks: list[Block]) -> None:
        for before, block in zip([None, *blocks], blocks, strict=False):
            if before is not None:
                block.previous, before.following = before, block
            if not block.allocated:
                block.pool.insert(block)


def _unmapped(start: int, end: int, pool: Pool, base: int | None) -> Block:
    block = Block(start, end - start, pool, base)
    block.mapped = False
    return block


def _merged(blocks: list[Block]) -> list[Block]:
    """The blocks, of which free neighbours in adjoining ranges have become one."""
    merged: list[Block] = []
    for block in blocks:
        last = merged[-1] if merged else None
        if last is not None and not last.allocated and not block.allocated and last.mapped == block.mapped:
            last.size += block.size
        else:
            merged.append(block)
    return merged
