"""A trace with three rounds of each loop says what the whole one says, and is replayed alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.prediction.allocator import AllocatorSettings, replay
from meftbench.prediction.columns import Trace
from meftbench.prediction.loops import expanded, shortened
from meftbench.units import MiB

# Of small and large segments, and such as leave rests that are not split off.
SIZES = st.one_of(
    st.integers(1, 2 * MiB),
    st.sampled_from([1, 512, 513, MiB - 1, MiB, MiB + 1, 9 * MiB, 10 * MiB, 19 * MiB, 21 * MiB]),
)


@st.composite
def rounds(draw):
    """What a round does, in order: (allocate, size) and (free, number of the allocation in the round, whether that of
    the round before)."""
    sizes = draw(st.lists(SIZES, min_size=4, max_size=6))
    later = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2))  # freed in the round after their own
    body = [("alloc", size) for size in sizes]
    for number in range(len(sizes)):
        born = next(place for place, entry in enumerate(body) if entry == ("alloc", sizes[number]))
        least = 0 if number in later else born + 1
        body.insert(draw(st.integers(max(least, _place(body, number)), len(body))), ("free", number, number in later))
    return body


def _place(body, number):
    """The first place after the allocation with this number in the round."""
    allocations = [place for place, entry in enumerate(body) if entry[0] == "alloc"]
    return allocations[number] + 1


@st.composite
def looping(draw):
    """Events of a program with one to three loops one after the other, between others; storages live beside them."""
    events, keys = [], iter(range(10**9))
    living = []

    def born(nbytes, origin="operator"):
        key = next(keys)
        events.append(("alloc", key, nbytes, "activations", origin))
        return key

    def ended(key):
        events.append(("free", key, 0, "", ""))

    def others():
        for size in draw(st.lists(SIZES, max_size=4)):
            living.append(born(size, "other"))
        for _ in range(draw(st.integers(0, len(living)))):
            ended(living.pop(draw(st.integers(0, len(living) - 1))))

    others()
    start = len(events)
    for phase in ("forward", "backward", "optimizer")[: draw(st.integers(1, 3))]:
        events.append(("phase", -1, 0, phase, ""))
        body = draw(rounds())
        sizes = [entry[1] for entry in body if entry[0] == "alloc"]
        carried = {entry[1]: born(sizes[entry[1]], "before") for entry in body if entry[0] == "free" and entry[2]}
        for _ in range(draw(st.integers(1, 14))):
            own = []
            for entry in body:
                if entry[0] == "alloc":
                    own.append(born(entry[1]))
                elif entry[2]:
                    ended(carried.pop(entry[1]))
                else:
                    ended(own[entry[1]])
            carried = {entry[1]: own[entry[1]] for entry in body if entry[0] == "free" and entry[2]}
        others()
        for key in carried.values():
            ended(key)
    others()
    return Trace.of(events, [start])


def equal(one, other):
    return all(np.array_equal(getattr(one, column), getattr(other, column)) for column in ("what", "storage", "nbytes"))


def replayed(trace, allocator):
    """What does not fit has another key in the whole trace: it may be in a round that the other leaves out."""
    events, starts = trace.without_starts()
    found = replay(events.events(), allocator, starts)
    return found if found.oom is None else replace(found, oom=found.oom._replace(key=0))


@settings(max_examples=200)
@given(
    trace=looping(),
    expandable=st.booleans(),
    max_split=st.sampled_from([None, 20 * MiB, 32 * MiB]),
    share=st.integers(1, 10),
)
def test_loops_are_shortened_without_a_trace(trace, expandable, max_split, share):
    """All rounds can be told again, and the allocator ends as after all of them, within less memory than they need,
    too."""
    allocator = AllocatorSettings(expandable_segments=expandable, max_split_size=max_split)

    short = shortened(trace)

    assert equal(trace, expanded(short))
    whole = replayed(trace, allocator)
    assert whole == replayed(short, allocator)
    less = replace(allocator, capacity=max(1, whole.reserved_peak * share // 10))
    assert replayed(trace, less) == replayed(short, less)


def a_loop(number, sizes, before=(), carried=False, one_by_one=False):
    """A round allocates `sizes` and frees them: with `carried` the last of them in the round after, with `one_by_one`
    each before the next is allocated."""
    events = [("alloc", key, size, "activations", "before") for key, size in enumerate(before)]
    keys = iter(range(len(before), 10**9))
    last = None
    start = len(events)
    if carried:
        last = next(keys)
        events.append(("alloc", last, sizes[-1], "activations", "before"))
    for _ in range(number):
        own = [next(keys) for _ in sizes]
        if one_by_one:
            for key, size in zip(own, sizes, strict=True):
                events += [("alloc", key, size, "activations", "tile"), ("free", key, 0, "", "")]
            continue
        events += [("alloc", key, size, "activations", "tile") for key, size in zip(own, sizes, strict=True)]
        if carried:
            events.append(("free", last, 0, "", ""))
            last = own.pop()
        events += [("free", key, 0, "", "") for key in own]
    return Trace.of(events, [start])


def test_a_long_loop_is_three_rounds():
    """However many there are, and whether a round frees its own storages or one of the round before."""
    sizes = (3 * MiB, 512, MiB, 5 * MiB)
    for carried in (False, True):
        lengths = {len(shortened(a_loop(number, sizes, carried=carried))) for number in (6, 60, 600)}

        assert 1 == len(lengths)
        assert lengths.pop() <= 3 * 2 * len(sizes) + 2 * 2 * len(sizes)
        assert len(a_loop(600, sizes, carried=carried)) > 4800


def test_rounds_that_take_turns_with_two_blocks_are_replayed_in_pairs():
    """Each round's buffer is allocated before the last one's is freed: an odd and an even number of rounds end in
    other blocks, and so does what fits beside them."""
    for number in range(8, 13):
        trace = a_loop(number, (3 * MiB, 512, 7 * MiB, 11 * MiB), before=(2 * MiB,), carried=True)
        short = shortened(trace)
        assert len(short) < len(trace)

        assert equal(trace, expanded(short))
        assert replayed(trace, AllocatorSettings()) == replayed(short, AllocatorSettings())


def test_a_loop_whose_rounds_keep_something_stays_whole():
    """Each leaves a storage alive: none may be left out."""
    events, keys = [], iter(range(1000))
    for _ in range(20):
        kept, *own = (next(keys) for _ in range(5))
        events += [("alloc", key, 512, "activations", "kept" if key == kept else "tile") for key in (kept, *own)]
        events += [("free", key, 0, "", "") for key in own]
    trace = Trace.of(events, [0])

    assert shortened(trace) is trace


def test_rounds_that_each_find_the_device_full_are_counted():
    """Small and large storages take turns on a device that has no room for segments of both: the rounds that are left
    out have given memory back, and taken it, as often as those that are replayed."""
    allocator = AllocatorSettings(expandable_segments=True, capacity=20 * MiB)
    for number in (20, 21, 40):
        trace = a_loop(number, (512, 10 * MiB, 12 * MiB, 12 * MiB), one_by_one=True)
        short = shortened(trace)

        assert len(short) < len(trace)
        whole = replayed(trace, allocator)
        assert whole == replayed(short, allocator)
        assert (None, 2 * number - 1) == (whole.oom, whole.retries)
