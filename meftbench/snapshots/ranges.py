"""Ranges of addresses that do not overlap, in order, each with something of its own."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Range(NamedTuple, Generic[T]):
    """Addresses from `start` up to and without `end`, in bytes."""

    start: int
    end: int
    item: T


class Ranges(Generic[T]):
    """A sorted collection of ranges; looking up takes the logarithm of their number."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._at: dict[int, Range[T]] = {}

    def __iter__(self) -> Iterator[Range[T]]:
        """In order of address; not while ranges are added or removed."""
        return (self._at[start] for start in self._starts)

    def at(self, start: int) -> Range[T] | None:
        """The range that begins at `start`."""
        return self._at.get(start)

    def covering(self, address: int) -> Range[T] | None:
        """The range that `address` lies in."""
        below = self.before(address + 1)
        return below if below is not None and address < below.end else None

    def before(self, address: int) -> Range[T] | None:
        """The last range that begins before `address`."""
        index = bisect_left(self._starts, address)
        return self._at[self._starts[index - 1]] if index else None

    def after(self, address: int) -> Range[T] | None:
        """The first range that begins at `address` or later."""
        index = bisect_left(self._starts, address)
        return self._at[self._starts[index]] if index < len(self._starts) else None

    def is_free(self, start: int, end: int) -> bool:
        """Whether no range has an address from `start` up to and without `end`."""
        below = self.before(end)
        return below is None or below.end <= start

    def add(self, start: int, end: int, item: T) -> bool:
        """Add a range. False: it has no address, or overlaps another, and nothing was done."""
        if start >= end or not self.is_free(start, end):
            return False
        self._starts.insert(bisect_right(self._starts, start), start)
        self._at[start] = Range(start, end, item)
        return True

    def remove(self, start: int) -> Range[T]:
        """Remove the range that begins at `start`, and return it."""
        del self._starts[bisect_left(self._starts, start)]
        return self._at.pop(start)

    def cut(self, start: int, end: int) -> list[Range[T]]:
        """Take the addresses from `start` up to and without `end` out of the ranges that have them all.

        Returns the parts that were taken out; an empty list: some of the addresses are in no range, and nothing was
        done.
        """
        parts: list[Range[T]] = []
        position = start
        while position < end:
            found = self.covering(position)
            if found is None:
                return []
            parts.append(Range(position, min(end, found.end), found.item))
            position = found.end
        for part in parts:
            whole = self.covering(part.start)
            assert whole is not None, "it was found above"
            self.remove(whole.start)
            self.add(whole.start, part.start, whole.item)
            self.add(part.end, whole.end, whole.item)
        return parts
