"""Loops in a trace, such as those over tiles of tokens: three rounds of each are kept, and the number of others noted.

A round that allocates what the round before it did, and frees that, leaves the allocator as it was: more rounds change
nothing. `shortened` marks the end of the first round and of the second; a replay compares the allocator's states there
(allocator.py), and carries out the second round again until they repeat. Of loops that tell where their rounds begin
(reversible/rounds.py), rounds were left out before the trace was made (`LeftOut`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from meftbench.prediction.allocator import AGAIN, ONCE
from meftbench.prediction.columns import SPREAD, Ints, Trace, What, number_of

_WINDOW = 8  # events that are compared at once, to find where a trace repeats itself
_FEWEST = 5  # rounds from which on some are left out
_CHANCE = 4  # events at the beginning of a loop of which the first may be none of it


class LeftOut(NamedTuple):
    """Rounds that a trace lacks. place: how many of its events come before them.  size: events of the round before
    them, which they are like.  rounds: how many they are."""

    place: int
    size: int
    rounds: int


class OtherRoundsError(Exception):
    """Rounds were left out that are not like those before them."""


class _Loop(NamedTuple):
    """begin: number of the first event.  size: events of a round.  stop: number of the event after the last that is
    like that of the round before.  left_out: how many more rounds there are than in the trace."""

    begin: int
    size: int
    stop: int
    left_out: int = 0

    @property
    def rounds(self) -> int:
        """How many there are in a row in the trace."""
        return (self.stop - self.begin) // self.size

    @property
    def end(self) -> int:
        return self.begin + self.rounds * self.size

    def with_those(self, all_left_out: list[LeftOut]) -> _Loop:
        """The loop with the rounds that were left out of it: where its last rounds are, or right after them."""
        own = [each for each in all_left_out if self.begin + 2 * self.size < each.place <= self.end + self.size]
        own = [each for each in own if each.size % self.size == 0]
        return self._replace(left_out=sum(each.rounds * (each.size // self.size) for each in own[:1]))


def shortened(trace: Trace, all_left_out: Iterable[LeftOut] = ()) -> Trace:
    """The trace with three rounds of each loop: the first, the second and the last.

    Raises OtherRoundsError: those of `all_left_out` are of no loop.
    """
    left = [each for each in all_left_out if each.rounds]
    born = trace.born
    last_meant = np.zeros(int(trace.is_kind("alloc").sum()), dtype=np.int64)
    named = trace.storage >= 0
    last_meant[trace.storage[named]] = np.flatnonzero(named)  # of several, the last one stays
    loops: list[_Loop] = []
    for alike in _loops(trace, born):
        # What ends before the loop may by chance be alike what ends with a round, so that the first events are none of
        # the loop's.
        begin = max(alike.begin, loops[-1].end if loops else 0)
        for number in range(begin, begin + _CHANCE):
            loop = alike._replace(begin=number)
            if loop.rounds >= _FEWEST and _is_closed(trace, born, last_meant, loop):
                loops.append(loop)
                break
    loops = [loop.with_those(left) for loop in loops]
    if sum(loop.left_out * loop.size for loop in loops) != sum(each.rounds * each.size for each in left):
        raise OtherRoundsError("rounds that were left out are of no loop")
    if not loops:
        return trace
    kept = np.ones(len(trace), dtype=np.bool_)
    dropped = np.zeros(len(last_meant) + 1, dtype=np.int64)
    for loop in loops:
        second, last = loop.begin + 2 * loop.size, loop.end - loop.size
        kept[second:last] = False
        dropped[born[second] : born[last]] = 1
    before = np.cumsum(dropped) - dropped  # of each storage, how many before it are left out
    fewer = np.where(named, before[trace.storage], 0)
    for loop in loops:  # its last round means storages of the one before, and then those of the second
        last = loop.end - loop.size
        fewer[last : loop.end] = np.where(named[last : loop.end], before[born[last]], 0)
    first_ends = np.array([loop.begin + loop.size for loop in loops])
    storages = [int(born[loop.begin + loop.size] - born[loop.begin]) for loop in loops]
    places = np.cumsum(kept)
    at = np.concatenate([places[first_ends - 1], places[[loop.begin + 2 * loop.size - 1 for loop in loops]]])
    kinds_of_marks = np.repeat([number_of(What(ONCE)), number_of(What(AGAIN))], len(loops))
    values = np.array([*storages, *(loop.rounds + loop.left_out - 3 for loop in loops)])
    return Trace(
        np.insert(trace.what[kept], at, kinds_of_marks),
        np.insert((trace.storage - fewer)[kept], at, -1),
        np.insert(trace.nbytes[kept], at, values),
    )


def expanded(trace: Trace) -> Trace:
    """The trace with all rounds of its loops, and without marks."""
    ends = [np.flatnonzero(trace.what == number_of(What(kind))).tolist() for kind in (ONCE, AGAIN)]
    if not ends[0]:
        return trace
    born = trace.born
    numbers: list[Ints] = []  # of events of this trace, in the order of the whole one
    later: list[Ints] = []  # how many storages of left out rounds stand between an event and the storage that it means
    begins: list[int] = []  # numbers of the storages from which on more were allocated before
    added: list[int] = [0]
    begin = 0

    def take(events: Ints, storages: Ints | int) -> None:
        numbers.append(events)
        later.append(np.broadcast_to(np.asarray(storages, dtype=np.int64), events.shape))

    for first, second in zip(*ends, strict=True):
        rounds, of_round = int(trace.nbytes[second]), int(trace.nbytes[first])
        events = np.arange(first + 1, second)
        take(np.arange(begin, first), 0)
        take(events, 0)
        for number in range(1, rounds + 1):
            take(events, number * of_round)
        last = np.arange(second + 1, second + 1 + len(events))
        take(last, np.where(trace.storage[last] < born[second], rounds * of_round, 0))
        begins.append(int(born[second]))
        added.append(added[-1] + rounds * of_round)
        begin = second + 1 + len(events)
    take(np.arange(begin, len(trace)), 0)
    source, more = np.concatenate(numbers), np.concatenate(later)
    storage = trace.storage[source]
    of_storage = np.array(added)[np.searchsorted(begins, storage, side="right")]
    return Trace(trace.what[source], np.where(storage < 0, storage, storage + of_storage + more), trace.nbytes[source])


def _loops(trace: Trace, born: Ints) -> Iterator[_Loop]:
    """Where at least `_FEWEST` rounds of the same events stand in a row; storages are the same where they were
    allocated equally many allocations before."""
    if len(trace) < _FEWEST * _WINDOW:
        return
    own = (trace.what * SPREAD + trace.nbytes) * SPREAD + np.where(trace.storage < 0, 0, born - trace.storage)
    windows = np.zeros(len(trace) - _WINDOW + 1, dtype=np.int64)
    for shift in range(_WINDOW):
        windows = windows * SPREAD + own[shift : shift + len(windows)]
    order = np.argsort(windows, kind="stable")
    alike = windows[order[:-1]] == windows[order[1:]]
    distance = np.zeros(len(windows), dtype=np.int64)  # from each window to the next that is the same
    distance[order[:-1][alike]] = (order[1:] - order[:-1])[alike]
    borders = np.flatnonzero(np.diff(distance)) + 1
    for begin, end in zip([0, *borders.tolist()], [*borders.tolist(), len(windows)], strict=True):
        size = int(distance[begin])
        # Where windows that begin in a row have their like `size` later, so have all events of the last of them.
        if size and (loop := _Loop(begin, size, end - 1 + _WINDOW + size)).rounds >= _FEWEST:
            yield loop


def _is_closed(trace: Trace, born: Ints, last_meant: Ints, loop: _Loop) -> bool:
    """Whether each round frees as many storages as it allocates, its own or those of the round before, and none of
    those that would be left out is meant by an event elsewhere."""
    second = slice(loop.begin + loop.size, loop.begin + 2 * loop.size)
    kinds = Trace(trace.what[second], trace.storage[second], trace.nbytes[second])
    if kinds.is_kind("alloc").sum() != kinds.is_kind("free").sum() or kinds.is_kind("phase", "start").any():
        return False
    named = kinds.storage[kinds.storage >= 0]
    left_out = last_meant[born[loop.begin + 2 * loop.size] : born[loop.end - loop.size]]
    return bool((named >= born[loop.begin]).all() and (left_out < loop.end).all())
