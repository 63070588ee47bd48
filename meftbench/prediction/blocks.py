"""Blocks of memory that torch's CUDA caching allocator hands out, and the pools of those that are free."""

from __future__ import annotations

from bisect import bisect_left, insort

# A free block is found by one number, its size before its address: numbers are compared faster than pairs.
ADDRESS_BITS = 48


class Block:
    """A range of addresses in a segment: handed out, free, or (if expandable) not mapped to memory."""

    # fmt: off
    __slots__ = ("address", "allocated", "born", "following", "label", "mapped", "pool", "previous", "requested",
                 "segment", "size")
    # fmt: on

    def __init__(self, address: int, size: int, pool: Pool, segment: int | None = None) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.segment = segment  # address of its expandable segment; None: its segment is from cudaMalloc
        self.requested = 0
        self.allocated = False
        self.mapped = True
        self.born = 0  # value of its pool's `searches` when it became free
        self.previous: Block | None = None
        self.following: Block | None = None
        self.label: object = None

    @property
    def is_split(self) -> bool:
        return self.previous is not None or self.following is not None

    def insert_before(self, block: Block) -> None:
        self.previous, self.following = block.previous, block
        if block.previous is not None:
            block.previous.following = self
        block.previous = self

    def insert_after(self, block: Block) -> None:
        self.previous, self.following = block, block.following
        if block.following is not None:
            block.following.previous = self
        block.following = self


class Pool:
    """Free blocks by size and address, and the unmapped ranges of expandable segments by address.

    page: bytes that an expandable segment maps at a time.  searches: calls of get_free_block, by which blocks age.
    order: a number for each free block, its size before its address, in order.  at: the block of each number.
    """

    def __init__(self, small: bool, page: int) -> None:
        self.small, self.page = small, page
        self.order: list[int] = []
        self.at: dict[int, Block] = {}
        self.unmapped: list[int] = []
        self.unmapped_at: dict[int, Block] = {}
        self.searches = 0

    def insert(self, block: Block) -> None:
        if block.mapped:
            block.born = self.searches
            place = block.size << ADDRESS_BITS | block.address
            insort(self.order, place)
            self.at[place] = block
        else:
            insort(self.unmapped, block.address)
            self.unmapped_at[block.address] = block

    def erase(self, block: Block) -> None:
        if block.mapped:
            place = block.size << ADDRESS_BITS | block.address
            del self.order[bisect_left(self.order, place)]
            del self.at[place]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]
            del self.unmapped_at[block.address]

    def first_of(self, size: int) -> int:
        """The index in `order` of the first block of at least `size` bytes."""
        return bisect_left(self.order, size << ADDRESS_BITS)

    def free_at(self, address: int) -> Block | None:
        """The free block that begins at an address."""
        return next((block for block in self.at.values() if block.address == address), None)

    def blocks(self) -> list[Block]:
        return [self.at[place] for place in self.order]
