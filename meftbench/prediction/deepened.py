"""The trace of a deep model told from those of three shallow ones, which are equally many layers apart.

Layers of one kind allocate alike. So the trace of a model with one layer more is that of the shallower one with some
blocks of events inserted: one where layers run forward, one where they run backward, one among the parameters, and so
on. Each further layer inserts the same blocks again. Which storage an event means, and how large it is, changes from
layer to layer and from depth to depth by a constant: three depths say by which, and whether that is so.

`Growth` raises IrregularError where it is not; then the whole model is to be traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meftbench.prediction.columns import Ints, Trace, sizes_of


class IrregularError(Exception):
    """Layers do not allocate alike, or their number changes more than how often their events occur."""


class Growth:
    """How a trace grows with the number of units of layers, from those of three models. first: of the shallowest.
    `second` has one unit more, and `third` two.

    Raises IrregularError: what the second unit adds does not follow from what the first adds.
    """

    def __init__(self, first: Trace, second: Trace, third: Trace) -> None:
        self.first, self._second, self._third = first, second, third
        traces = (first, second, third)
        # A size may depend on the depth, as that of a tensor with a part for each layer does; those tell no layer's
        # kind.
        self._sizes = np.intersect1d(np.intersect1d(sizes_of(first), sizes_of(second)), sizes_of(third))
        self._symbols = [trace.symbols(self._sizes) for trace in traces]
        rule = _Rule.of(self._symbols[0], self._symbols[1])
        if not np.array_equal(rule.repeated(self._symbols[0], self._symbols[1], 2), self._symbols[2]):
            raise IrregularError("a second unit of layers adds other events than the first")
        self._rule = rule.placed([[trace.storage, trace.nbytes] for trace in traces])
        self._grown: dict[int, Trace] = {}

    @classmethod
    def of_two(cls, known: Growth, first: Trace, second: Trace) -> Growth:
        """The same from two models alone, in another shape of the batch than that of `known`, in which layers allocate
        otherwise: what a third would be is told from the units of the second.

        Raises IrregularError: units are not inserted where they are in `known`, or what follows is no trace.
        """
        sizes = np.intersect1d(sizes_of(first), sizes_of(second))
        rule = _Rule.of(first.symbols(sizes), second.symbols(sizes)).placed_as(known._rule)
        third = Trace(
            rule.repeated(first.what, second.what, 2),
            rule.third(first.storage, second.storage),
            rule.third(first.nbytes, second.nbytes),
        )
        growth = cls(first, second, third)
        growth.by(2)
        return growth

    def by(self, times: int) -> Trace:
        """The trace of `times` units more than the first. Raises IrregularError: values do not change by constants, or
        the result is no trace."""
        if times not in self._grown:
            rule, traces = self._rule, (self.first, self._second, self._third)
            grown = Trace(
                rule.repeated(self.first.what, self._second.what, times),
                rule.continued([trace.storage for trace in traces], times),
                rule.continued([trace.nbytes for trace in traces], times),
            )
            _check(grown, rule.repeated(self._symbols[0], self._symbols[1], times), self._sizes)
            self._grown[times] = grown
        return self._grown[times]

    def alike(self, trace: Trace, times: int) -> Trace | None:
        """The trace of `times` units more than `trace`, which is of as many as the first, but in another shape of the
        batch. None: its events are not those of the first in other sizes, or it cannot be told from them."""
        if not trace.has_events_of(self.first):
            return None
        grown, source = self.by(times), self._rule.sources(times)
        own, other = self.first.nbytes[source], trace.nbytes[source]
        grows = grown.nbytes != own  # sizes that depend on the depth: known only where the shape does not matter
        if (other[grows] != own[grows]).any() or not self._rule.alike_around(self.first.nbytes, trace.nbytes):
            return None
        return Trace(grown.what, grown.storage, np.where(grows, grown.nbytes, other))


def _check(trace: Trace, symbols: Ints, sizes: Ints) -> None:
    """Raises IrregularError where the events do not mean storages of the kind and size that their symbols say, or free
    one before it is allocated or twice."""
    allocated = np.flatnonzero(trace.is_kind("alloc"))
    later = np.flatnonzero(trace.is_kind("free", "book"))
    frees = trace.storage[trace.is_kind("free")]
    if not np.array_equal(trace.storage[allocated], np.arange(len(allocated))) or (trace.nbytes < 0).any():
        raise IrregularError("storages are not numbered as they are allocated")
    if len(later) and (trace.storage[later].min() < 0 or trace.storage[later].max() >= len(allocated)):
        raise IrregularError("a storage ends that was not allocated")
    if (allocated[trace.storage[later]] > later).any() or len(np.unique(frees)) != len(frees):
        raise IrregularError("a storage ends before it is allocated, or twice")
    if not np.array_equal(trace.symbols(sizes), symbols):
        raise IrregularError("a storage ends as one of another kind")


@dataclass(frozen=True)
class _Rule:
    """Where the blocks of events of one unit of layers are inserted.

    blocks: (place in the shallowest trace, number of events), in order.  length: of that trace.
    slack: for each block, by how many events it can be inserted earlier, so that the same symbols result.
    earlier: for each block, how many times its own length earlier than possible it is inserted.
    """

    blocks: list[tuple[int, int]]
    slack: list[int]
    length: int
    earlier: tuple[int, ...] = ()

    @classmethod
    def of(cls, first: Ints, second: Ints) -> _Rule:
        """Each block as late as possible. Raises IrregularError: no blocks lead from `first` to `second`, symbols."""
        blocks: list[tuple[int, int]] = []
        slack: list[int] = []
        at_first = at_second = earlier = 0
        while True:
            alike = _alike(first[at_first:], second[at_second:])
            at_first, at_second = at_first + alike, at_second + alike
            if at_first == len(first) and at_second == len(second):
                return cls(blocks, slack, len(first))
            size = _size_of_block(first, second, at_first, at_second)
            room = first[earlier:at_first]
            slack.append(_alike(room[::-1], second[at_second + size - len(room) : at_second + size][::-1]))
            blocks.append((at_first, size))
            earlier = at_first
            at_second += size

    def placed(self, columns: list[list[Ints]]) -> _Rule:
        """The same blocks where the events on both sides mean the storages that their neighbours mean: in the middle of
        a row of alike blocks, as the first and the last layer may mean others; of layers of one stretch, where another
        stretch of the stack has the same events in this place.

        columns: of the three traces, those whose values change by constants.
        """
        backs, shift = [], 0
        for (place, size), slack in zip(self.blocks, self.slack, strict=True):
            begin = place - slack
            before = self._steady(columns, begin, place, shift)
            after = self._steady(columns, begin, place, shift + size)
            most = slack // size
            fitting = [
                back
                for back in range(most + 1)
                if before[: slack - back * size].all() and after[slack - back * size :].all()
            ]
            back = min(fitting, key=lambda back: abs(2 * back - fitting[0] - fitting[-1])) if fitting else most // 2
            backs.append(back)
            shift += size
        return self._earlier(backs)

    def placed_as(self, known: _Rule) -> _Rule:
        """The same blocks as much earlier as those of a rule that was placed. Raises IrregularError: it has others."""
        room = [slack // size for (_, size), slack in zip(self.blocks, self.slack, strict=True)]
        if room != [slack // size for (_, size), slack in zip(known.blocks, known.slack, strict=True)]:
            raise IrregularError("units are inserted in other places")
        return self._earlier(known.earlier)

    def _earlier(self, backs: Sequence[int]) -> _Rule:
        blocks = [(place - back * size, size) for (place, size), back in zip(self.blocks, backs, strict=True)]
        return replace(self, blocks=blocks, earlier=tuple(backs))

    def third(self, first: Ints, second: Ints) -> Ints:
        """A column of a third trace, with two units more than the first, whose values change as those of the second do:
        with the depth as in the unit before the one that is inserted, and from that to this one as to the next.

        Raises IrregularError: one unit is inserted within another.
        """
        parts, begin, shift = [], 0, 0
        for place, size in [*self.blocks, (self.length, 0)]:
            own = first[begin:place]
            parts.append(own + 2 * (second[begin + shift : place + shift] - own))
            if size:
                if place - size < begin:
                    raise IrregularError("a unit is inserted within another")
                inserted, before = (
                    second[place + shift : place + shift + size],
                    second[place + shift - size : place + shift],
                )
                next_inserted = inserted + (before - first[place - size : place])
                parts += [next_inserted, next_inserted + (inserted - before)]
            begin, shift = place, shift + size
        return np.concatenate(parts)

    def _steady(self, columns: list[list[Ints]], begin: int, end: int, shift: int) -> NDArray[np.bool_]:
        """Which of the events from `begin` to `end` in the first trace have values that change by constants, where the
        deeper traces have `shift` more events before them for each unit."""
        steady = np.ones(end - begin, dtype=np.bool_)
        for first, second, third in zip(*columns, strict=True):
            own, two = first[begin:end], third[begin + 2 * shift : end + 2 * shift]
            steady &= two - own == 2 * (second[begin + shift : end + shift] - own)
        return steady

    def repeated(self, first: Ints, second: Ints, times: int) -> Ints:
        """A column of the trace with `times` units more, in which each of them has the same values."""
        parts, begin, shift = [], 0, 0
        for place, size in self.blocks:
            block = second[place + shift : place + shift + size]
            parts += [first[begin:place], *[block] * times]
            begin, shift = place, shift + size
        return np.concatenate([*parts, first[begin:]])

    def sources(self, times: int) -> Ints:
        """For each event with `times` units more, the one in the first trace that is like it: that of the layer before,
        where it is inserted."""
        numbers, parts, begin = np.arange(self.length), [], 0
        for place, size in self.blocks:
            parts += [numbers[begin:place], *[numbers[place - size : place]] * times]
            begin = place
        return np.concatenate([*parts, numbers[begin:]])

    def alike_around(self, known: Ints, column: Ints) -> bool:
        """Whether the layers before and after the places where units are inserted have the same values in `column`
        wherever they have them in `known`, of another shape."""
        for place, size in self.blocks:
            size_after = min(size, self.length - place)
            before, after = slice(place - size, place - size + size_after), slice(place, place + size_after)
            if ((known[before] == known[after]) & (column[before] != column[after])).any():
                return False
        return True

    def continued(self, columns: list[Ints], times: int) -> Ints:
        """A column of the trace with `times` units more, whose values change by constants with the depth, and from one
        unit to the next.

        columns: of the three traces. Raises IrregularError: between these a value changes by different amounts.
        """
        first, second, third = columns
        parts, begin, shift = [], 0, 0
        numbers = np.arange(times)[:, None]
        for place, size in [*self.blocks, (self.length, 0)]:
            own = first[begin:place]
            change = second[begin + shift : place + shift] - own
            if not np.array_equal(third[begin + 2 * shift : place + 2 * shift] - own, 2 * change):
                raise IrregularError("a value does not change by the same amount with each unit of layers")
            parts.append(own + times * change)
            # Of `times` units, the one with number n has value(1, 0) + n · by_unit + (times - 1) · by_depth.
            one = second[place + shift : place + shift + size]
            two = third[place + 2 * shift : place + 2 * shift + 2 * size].reshape(2, size)
            by_depth, by_unit = two[0] - one, two[1] - two[0]
            parts.append((one + numbers * by_unit + (times - 1) * by_depth).reshape(-1))
            begin, shift = place, shift + size
        return np.concatenate(parts)


def _alike(left: Ints, right: Ints) -> int:
    """How many elements two arrays have in common at their beginnings."""
    most, done = min(len(left), len(right)), 0
    while done < most:  # in pieces, as commonly a short one tells
        end = min(done + 4096, most)
        different = np.flatnonzero(left[done:end] != right[done:end])
        if len(different):
            return done + int(different[0])
        done = end
    return done


def _size_of_block(first: Ints, second: Ints, at_first: int, at_second: int) -> int:
    """The number of events that are inserted at a place: after them, the traces are alike for longest. What is inserted
    is what stands right before: a unit of layers that the shallower trace has, too.

    Raises IrregularError: nothing inserted there makes them alike.
    """
    most = min(len(second) - len(first) - (at_second - at_first), at_second)
    sizes: Iterable[int]
    if at_first == len(first):
        sizes = [most]
    else:
        sizes = np.flatnonzero(second[at_second : at_second + most + 1] == first[at_first]).tolist()
    best, longest = 0, 0
    for size in sizes:
        block = second[at_second : at_second + size]
        if size and np.array_equal(block, second[at_second - size : at_second]):
            alike = _alike(first[at_first:], second[at_second + size :])
            if alike > longest or at_first == len(first):
                best, longest = size, alike
    if not best:
        raise IrregularError("a unit of layers adds events that no layer before has")
    return best
