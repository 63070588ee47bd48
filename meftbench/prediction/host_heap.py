"""Memory that a step on a CPU takes from the kernel anew, by the rules of glibc's malloc.

The kernel clears each page when it is first touched, which takes longer than to write it. malloc keeps what is freed,
but for blocks of more than 32 MiB for which its heap has no room: these are pages of their own, given back when they
are freed. (The threshold grows to this by itself.) Source: malloc/malloc.c, sysmalloc, DEFAULT_MMAP_THRESHOLD_MAX;
mallopt(3).

Left out: malloc also gives back free memory at the end of its heap. In steps that were watched (Linux, page faults of
getrusage) it did not, because small blocks that live on lie there; and the heap has room beside from loading a model.
"""

from __future__ import annotations

from bisect import insort

from meftbench.prediction.allocator import Event
from meftbench.units import MiB

_OWN_PAGES_FROM = 32 * MiB


class Heap:
    """malloc's heap: the smallest free block that is large enough is taken, free neighbours become one block, and what
    lies at the end is taken last.

    fresh: bytes taken from the kernel since it was last set to 0.
    """

    def __init__(self) -> None:
        self.fresh = self._end = 0
        self._free: list[tuple[int, int]] = []  # address and size, by address
        self._used: dict[int, tuple[int | None, int]] = {}  # by key; address None: pages of their own

    def allocate(self, key: int, size: int) -> None:
        """Take `size` bytes for the block `key`."""
        self._used[key] = self._placed(size), size

    def _placed(self, size: int) -> int | None:
        last = self._free[-1] if self._free and sum(self._free[-1]) == self._end else None
        inside = self._free[:-1] if last else self._free
        fitting = [block for block in inside if block[1] >= size]
        if fitting or (last and last[1] >= size):
            block = min(fitting, key=_size) if fitting else self._free[-1]
            self._free.remove(block)
            if block[1] > size:
                insort(self._free, (block[0] + size, block[1] - size))
            return block[0]
        if size > _OWN_PAGES_FROM:
            self.fresh += size
            return None
        address = self._free.pop()[0] if last else self._end
        self.fresh += address + size - self._end
        self._end = address + size
        return address

    def free(self, key: int) -> None:
        """Give the block `key` back; one that is not known was allocated before the heap was watched."""
        address, size = self._used.pop(key, (None, 0))
        if address is None:
            return
        begin, end = address, address + size
        for other in [block for block in self._free if sum(block) == begin or block[0] == end]:
            self._free.remove(other)
            begin, end = min(begin, other[0]), max(end, sum(other))
        insort(self._free, (begin, end - begin))


def _size(block: tuple[int, int]) -> int:
    return block[1]


def fresh_bytes(events: list[Event], start: int) -> int:
    """Bytes taken from the kernel by the events from number `start` on."""
    heap = Heap()
    for number, event in enumerate(events):
        if number == start:
            heap.fresh = 0
        if event.kind == "alloc":
            heap.allocate(event.key, event.nbytes)
        elif event.kind == "free":
            heap.free(event.key)
    return heap.fresh if start < len(events) else 0
