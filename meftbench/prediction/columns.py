"""Events of a trace in columns, in which what is alike can be found by comparing numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meftbench.prediction.allocator import FREE, MARK, Asked, Event

START = "start"  # kind of an event: a step begins. The allocator knows no such event.
SPREAD = 1_000_003  # a prime: numbers that are to be compared are hashes, in 64 bits that overflow

Ints = NDArray[np.int64]


class What(NamedTuple):
    """What events have in common wherever they occur: as of `Event`."""

    kind: str
    category: str = ""
    origin: str = ""


_known: dict[What, int] = {}  # numbers of `What`s, the same in all traces of this process
_whats: list[What] = []


def number_of(what: What) -> int:
    if what not in _known:
        _known[what] = len(_whats)
        _whats.append(what)
    return _known[what]


@dataclass(frozen=True)
class Trace:
    """Events in columns, in order of time.

    what: numbers of `What`s.  storage: of an allocation, how many came before it; of a free or a change of category,
    that of the allocation which it means; others: -1.  nbytes: of an allocation, others: 0. The marks of
    loops.py are events, too: their numbers are in `nbytes`.
    """

    what: Ints
    storage: Ints
    nbytes: Ints

    def __len__(self) -> int:
        return len(self.what)

    @classmethod
    def of(cls, events: Iterable[tuple[str, int, int, str, str]], starts: Iterable[int] = ()) -> Trace:
        """events: (kind, key, bytes, category, origin), as a storage counter lists them; keys may be used again.
        starts: the numbers of those with which steps begin.

        Storages that end one after the other, or change their category, are put into the order of their allocation:
        autocast, for one, empties its cache in the order of addresses, and autograd gives gradients to parameters in
        that of a heap. To the allocator that makes no difference.
        """
        begins = set(starts)
        what: list[int] = []
        storage: list[int] = []
        nbytes: list[int] = []
        alive: dict[int, int] = {}
        born = 0
        start = number_of(What(START))
        for number, (kind, key, size, category, origin) in enumerate(events):
            if number in begins:
                what.append(start)
                storage.append(-1)
                nbytes.append(0)
            what.append(number_of(What(kind, category, origin)))
            nbytes.append(size)
            if kind == "alloc":
                alive[key] = born
                born += 1
            storage.append(-1 if kind == "phase" else alive[key])
            if kind == "free":
                del alive[key]
        columns = [np.array(column, dtype=np.int64) for column in (what, storage, nbytes)]
        trace = cls(*columns)
        frees, books = trace.is_kind("free"), trace.is_kind("book")
        group = np.where(frees, 1, np.where(books, 2, 0))
        run = np.cumsum(np.diff(group, prepend=0) != 0)  # the same number: frees in a row, changes, or others
        order = np.lexsort((np.where(group > 0, trace.storage, np.arange(len(trace))), run))
        return cls(*(column[order] for column in columns))

    def without_starts(self) -> tuple[Trace, list[int]]:
        """The other events, and the numbers of those with which steps begin."""
        starts = self.is_kind(START)
        numbers = np.flatnonzero(starts) - np.arange(starts.sum())
        return self.chosen(~starts), numbers.tolist()

    def chosen(self, chosen: NDArray[np.bool_] | slice) -> Trace:
        """Some of the events; storages keep their numbers."""
        return Trace(self.what[chosen], self.storage[chosen], self.nbytes[chosen])

    def events(self) -> list[Event]:
        """The events one by one; of `without_starts`."""
        columns = zip(self.what.tolist(), self.storage.tolist(), self.nbytes.tolist(), strict=True)
        return [Event(_whats[number].kind, key, size, *_whats[number][1:]) for number, key, size in columns]

    def asked(self) -> Asked:
        """The events as the allocator needs them; none of them is a change of category."""
        sizes = np.where(self.is_kind("alloc"), self.nbytes, np.where(self.is_kind("free"), FREE, MARK))
        marks = np.flatnonzero(sizes == MARK).tolist()

        def event(number: int) -> Event:
            return self.chosen(slice(number, number + 1)).events()[0]

        return Asked(self.storage.tolist(), sizes.tolist(), marks, event)

    def symbols(self, sizes: Ints) -> Ints:
        """A number for each event, the same for events that are alike: in `What`, and in bytes where `sizes` has those
        (`sizes_of`); frees and changes of category also in those of the allocation which they mean."""
        own, allocations = self.what * SPREAD, self.is_kind("alloc")
        sized = sizes_of(self)
        own[allocations] += np.where(np.isin(sized, sizes), self.nbytes[allocations] + 1, 0)
        later = self.is_kind("free", "book")
        own[later] = own[later] * SPREAD + own[allocations][self.storage[later]]
        return own

    def has_events_of(self, other: Trace) -> bool:
        """Whether the events are those of the other trace, apart from sizes."""
        return np.array_equal(self.what, other.what) and np.array_equal(self.storage, other.storage)

    @property
    def born(self) -> Ints:
        """For each event, how many storages were allocated before it."""
        allocations = self.is_kind("alloc")
        return np.cumsum(allocations) - allocations

    def is_kind(self, *kinds: str) -> NDArray[np.bool_]:
        return np.array([what.kind in kinds for what in _whats], dtype=np.bool_)[self.what]

    def is_of(self, category: str) -> NDArray[np.bool_]:
        return np.array([what.category == category for what in _whats], dtype=np.bool_)[self.what]


def joined(traces: list[Trace]) -> Trace:
    """The events of several, one after the other."""
    return Trace(
        *(np.concatenate([getattr(trace, name) for trace in traces]) for name in ("what", "storage", "nbytes"))
    )


def sizes_of(trace: Trace) -> Ints:
    """A number for each allocation, the same for those that are alike in `What` and in bytes."""
    allocations = trace.is_kind("alloc")
    return trace.what[allocations] * SPREAD * SPREAD + trace.nbytes[allocations]
