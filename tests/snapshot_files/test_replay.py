"""The trace of a snapshot undone and replayed: what torch's allocator did, on one stream and on several."""

from __future__ import annotations

from dataclasses import replace as with_fields

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from allocator_traces import SETTINGS, traces
from meftbench.errors import UserError
from meftbench.prediction.allocator import AllocatorSettings, Event, replay, snapshot
from meftbench.snapshots.replay import Allocation, Moment, allocations
from meftbench.snapshots.replay import replay as lock_step
from meftbench.snapshots.state import state_before
from meftbench.snapshots.what_if import gives_back_all, what_if
from snapshots import MiB, a_block, a_segment, a_snapshot, a_step, an_entry, checked

DEFAULT, EXPANDABLE = AllocatorSettings(), AllocatorSettings(expandable_segments=True)
OTHER_STREAM = 2**40  # what its addresses are shifted by


def recorded_from(shot, first):
    """The snapshot of a recording that began with entry `first`."""
    return shot | {"device_traces": [shot["device_traces"][0][first:]]}


def ran_out(shot):
    return any(entry["action"] == "oom" for entry in shot["device_traces"][0])


@given(traces(), SETTINGS)
def test_what_the_rules_recorded_the_rules_replay(events, settings):
    """From an empty device: retries and running out of memory included. What torch gave back is taken from the trace.
    Left out are expandable segments on a full device, where addresses that the trace does not have decide."""
    assume(not (settings.expandable_segments and settings.capacity))

    found = lock_step(checked(snapshot(events, settings)))

    assert found.allocations == found.agreeing
    assert found.first_difference is None


@given(traces(), SETTINGS)
def test_the_replay_ends_with_the_blocks_and_segments_of_the_snapshot(events, settings):
    """Whatever the settings, also where the rules differ from the trace: it then goes on from what the trace has."""
    shot = snapshot(events, settings)

    found = lock_step(checked(shot))

    last = [found.before, *found.after][-1]
    assert sum(segment["total_size"] for segment in shot["segments"]) == last.reserved == found.replayed_reserved
    assert sum(segment["requested_size"] for segment in shot["segments"]) == last.requested


@pytest.mark.parametrize("again", [0, 64 * MiB])
def test_an_expandable_segment_that_was_given_back_begins_anew(again):
    """At the same address or at another."""
    size, page = 8 * MiB, 20 * MiB
    trace = [
        an_entry("segment_map", 0, page),
        an_entry("alloc", 0, size),
        an_entry("free_requested", 0, size),
        an_entry("free_completed", 0, size),
        an_entry("segment_unmap", 0, page),
        an_entry("segment_map", again, page),
        an_entry("alloc", again, size),
        an_entry("segment_map", again + page, page),
        an_entry("alloc", again + size, 2 * size),
    ]
    blocks = [a_block(size, state="active_allocated"), a_block(2 * size, state="active_allocated"), a_block(2 * size)]
    segment = a_segment(again, *blocks, expandable=True)

    found = lock_step(checked(a_snapshot([segment], trace, expandable_segments=True)))

    assert (3, 3, None) == (found.allocations, found.agreeing, found.first_difference)
    assert 2 * page == found.replayed_reserved_peak


@given(traces(), SETTINGS, st.floats(0, 1))
def test_the_levels_of_a_part_are_those_of_the_whole(events, settings, share):
    """The state before a recording follows from its end: the same bytes requested and reserved after each entry."""
    shot = snapshot(events, settings)
    first = int(share * len(shot["device_traces"][0]))

    whole, part = lock_step(checked(shot)), lock_step(checked(recorded_from(shot, first)))

    levels = [whole.before, *whole.after]
    assert [level[1:] for level in levels[first:]] == [level[1:] for level in [part.before, *part.after]]


@given(traces(), st.floats(0, 1))
def test_a_recording_that_begins_in_a_grown_expandable_segment_is_replayed(events, share):
    """Without a limit all is determined: no block has an unsplit rest, and nothing was unmapped."""
    shot = snapshot(events, EXPANDABLE)

    found = lock_step(checked(recorded_from(shot, int(share * len(shot["device_traces"][0])))))

    assert found.allocations == found.agreeing


def test_the_unsplit_rest_of_a_block_from_before_follows_from_what_stands_behind_it():
    """19.5 of 20 MiB leave half a MiB, which goes to nobody else: it is the block's. Recorded from its end on."""
    shot = snapshot([Event("alloc", 1, int(19.5 * MiB)), Event("free", 1, 0)])

    found = lock_step(checked(recorded_from(shot, 2)))

    assert Moment(20 * MiB, int(19.5 * MiB), 20 * MiB) == found.before
    assert Moment(0, 0, 20 * MiB) == found.after[-1]


@given(traces(), SETTINGS, st.sampled_from([None, 40 * MiB, 200 * MiB]))
def test_other_settings_reserve_what_they_would_have_reserved(events, settings, capacity):
    """Recorded with the defaults and replayed with others, as when the events are replayed with them."""
    settings = with_fields(settings, capacity=capacity)
    recorded = checked(snapshot(events))

    found = what_if(recorded, state_before(recorded), settings)

    expected = replay(events, settings)
    assert expected.reserved_peak == found.reserved_peak
    assert expected.retries == found.retries
    assert (expected.oom is None) == (found.oom_at is None)


def on_stream(shot, stream, shift):
    """The snapshot as of another stream, at other addresses."""
    segments = [
        segment
        | {"stream": stream, "address": segment["address"] + shift}
        | {"blocks": [block | {"address": block["address"] + shift} for block in segment["blocks"]]}
        for segment in shot["segments"]
    ]
    trace = [entry | {"stream": stream, "addr": entry["addr"] + shift} for entry in shot["device_traces"][0]]
    return segments, trace


@given(traces(), traces(), st.sampled_from([DEFAULT, EXPANDABLE]), st.randoms())
def test_no_stream_takes_the_free_blocks_of_another(one, other, settings, chance):
    """Two recordings shuffled into one, each as it was on a stream of its own: both are replayed as they were."""
    first_segments, first = on_stream(snapshot(one, settings), 0, 0)
    second_segments, second = on_stream(snapshot(other, settings), 9, OTHER_STREAM * 64)
    # torch takes a segment and hands out a block of it in one go, and so they stay together.
    trace = []
    while first or second:
        side = first if first and (not second or chance.random() < len(first) / (len(first) + len(second))) else second
        trace.append(side.pop(0))
        while trace[-1]["action"].startswith("segment_") and side:
            trace.append(side.pop(0))
    both = checked(
        a_snapshot(first_segments + second_segments, trace, expandable_segments=settings.expandable_segments)
    )

    found = lock_step(both)

    assert found.allocations == found.agreeing
    others = what_if(both, state_before(both), AllocatorSettings())
    assert replay(one).reserved + replay(other).reserved == others.reserved


def test_on_a_full_device_the_unused_memory_of_every_stream_is_given_back():
    """12 MiB of one stream are free when the other asks for 16 of 20: one retry, and it has them."""
    trace = [
        an_entry("segment_alloc", 0, 12 * MiB, 1),
        an_entry("alloc", 0, 12 * MiB, 1),
        an_entry("free_requested", 0, 12 * MiB, 1),
        an_entry("free_completed", 0, 12 * MiB, 1),
        an_entry("segment_alloc", 64 * MiB, 16 * MiB, 2),
        an_entry("alloc", 64 * MiB, 16 * MiB, 2),
    ]
    in_use = a_block(16 * MiB, state="active_allocated")
    recorded = checked(
        a_snapshot([a_segment(0, a_block(12 * MiB), stream=1), a_segment(64 * MiB, in_use, stream=2)], trace)
    )

    found = what_if(recorded, state_before(recorded), AllocatorSettings(capacity=20 * MiB))

    assert (16 * MiB, 1, None) == (found.reserved_peak, found.retries, found.oom_at)


def test_a_block_that_another_stream_still_uses_is_free_but_not_handed_out():
    """Between free_requested and free_completed: memory_allocated is without it, and the next 12 MiB lie elsewhere."""
    size, second = 12 * MiB, 64 * MiB
    trace = [
        an_entry("segment_alloc", 0, size),
        an_entry("alloc", 0, size),
        an_entry("free_requested", 0, size),
        an_entry("segment_alloc", second, size),
        an_entry("alloc", second, size),
        an_entry("free_completed", 0, size),
        an_entry("alloc", 0, size),
    ]
    in_use = a_block(size, state="active_allocated")
    segments = [a_segment(0, in_use), a_segment(second, dict(in_use))]

    found = lock_step(checked(a_snapshot(segments, trace)))

    assert (3, 3) == (found.allocations, found.agreeing)
    assert [0, 12, 0, 0, 12, 12, 24] == [level // MiB for level in found.levels]


def test_a_block_that_waits_at_the_end_and_before_the_trace_counts_as_free():
    waits = a_block(12 * MiB, state="active_awaiting_free")

    found = lock_step(checked(a_snapshot([a_segment(0, waits)], [an_entry("snapshot", 0, 0)])))

    assert Moment(0, 0, 12 * MiB) == found.before == found.after[-1]


def test_private_pools_are_counted_and_not_replayed():
    """A block of a CUDA graph lies where no rule of the other pools would put it; its bytes are in the levels."""
    trace = [
        an_entry("segment_alloc", 0, 20 * MiB),
        an_entry("alloc", 8 * MiB, 5 * MiB),
        an_entry("segment_alloc", 64 * MiB, 20 * MiB),
        an_entry("alloc", 64 * MiB, 5 * MiB),
    ]
    graph = a_segment(0, a_block(8 * MiB), a_block(5 * MiB, state="active_allocated"), a_block(7 * MiB), pool=(0, 3))
    other = a_segment(64 * MiB, a_block(5 * MiB, state="active_allocated"), a_block(15 * MiB))
    recorded = checked(a_snapshot([graph, other], trace))

    found = lock_step(recorded)

    assert (1, 1, 1) == (found.private, found.allocations, found.agreeing)
    assert Moment(10 * MiB, 10 * MiB, 40 * MiB) == found.after[-1]
    assert 40 * MiB == what_if(recorded, state_before(recorded), EXPANDABLE).reserved_peak


def test_an_address_that_the_rules_do_not_choose_is_counted_and_what_follows_is_held_against_torch():
    """The second of three is 7 MiB higher than it could be; the third then lies where the rules put it."""
    size = 5 * MiB
    trace = [
        an_entry("segment_alloc", 0, 20 * MiB),
        an_entry("alloc", 0, size),
        an_entry("alloc", 12 * MiB, size),
        an_entry("alloc", 5 * MiB, size),
    ]
    used = {"requested": size, "state": "active_allocated"}
    blocks = [a_block(size, **used), a_block(size, **used), a_block(2 * MiB), a_block(size, **used), a_block(3 * MiB)]

    found = lock_step(checked(a_snapshot([a_segment(0, *blocks)], trace)))

    assert (3, 2, 2) == (found.allocations, found.agreeing, found.first_difference)
    assert 15 * MiB == found.levels[-1]


def test_memory_that_torch_took_and_the_rules_do_not_take_is_a_difference():
    """20 MiB more are taken while 15 of 20 are free, and the block comes from these."""
    trace = [
        an_entry("segment_alloc", 0, 20 * MiB),
        an_entry("alloc", 0, 5 * MiB),
        an_entry("segment_alloc", 64 * MiB, 20 * MiB),
        an_entry("alloc", 5 * MiB, 5 * MiB),
    ]
    used = a_block(5 * MiB, state="active_allocated")
    segments = [a_segment(0, used, dict(used), a_block(10 * MiB)), a_segment(64 * MiB, a_block(20 * MiB))]

    found = lock_step(checked(a_snapshot(segments, trace)))

    assert (2, 1, 3) == (found.allocations, found.agreeing, found.first_difference)
    assert 40 * MiB == found.replayed_reserved == found.after[-1].reserved


def a_stack(name):
    return [{"filename": "memory.py", "line": 1, "name": name}] if name else []


def given_back(*names):
    """A trace that gives memory back, each time with that function on the stack; "oom" is where torch gave up."""
    entries = [
        an_entry("oom", 0, 2 * MiB) if name == "oom" else an_entry("segment_free", 0, 2 * MiB, frames=a_stack(name))
        for name in names
    ]
    return checked(a_snapshot([], entries)).trace


@pytest.mark.parametrize(
    ("names", "calls"),
    [
        ((), set()),
        (("empty_cache", "empty_cache"), {0}),
        (("c10::cuda::CUDACachingAllocator::emptyCache",), {0}),
        (("linear",), set()),
        (("linear", "oom", "empty_cache"), {2}),
        (("",), {0}),
        (("", "oom"), set()),
    ],
)
def test_emptying_the_cache_is_told_from_a_full_device(names, calls):
    """By the stack of what was given back; without one, it is taken for a call unless the allocation then failed."""
    assert calls == gives_back_all(given_back(*names))


def test_emptying_the_cache_is_done_with_other_settings_too():
    """12 MiB come, go and are given back, and 14 come: never both."""
    trace = [
        an_entry("segment_alloc", 0, 12 * MiB),
        an_entry("alloc", 0, 12 * MiB),
        an_entry("free_requested", 0, 12 * MiB),
        an_entry("free_completed", 0, 12 * MiB),
        an_entry("segment_free", 0, 12 * MiB),
        an_entry("segment_alloc", 64 * MiB, 14 * MiB),
        an_entry("alloc", 64 * MiB, 14 * MiB),
    ]
    recorded = checked(a_snapshot([a_segment(64 * MiB, a_block(14 * MiB, state="active_allocated"))], trace))

    assert 14 * MiB == what_if(recorded, state_before(recorded), DEFAULT).reserved_peak
    assert 2 == lock_step(recorded).agreeing


def test_allocations_are_listed_with_their_birth_and_end():
    shot = checked(a_step())

    assert [Allocation(12 * MiB, 1, None), Allocation(8 * MiB, 3, 4)] == allocations(shot.trace)
    assert [0, 12, 12, 20, 12, 12] == [level // MiB for level in lock_step(shot).levels]


CONTRADICTIONS = {
    "is in no segment": [an_entry("alloc", 2**30, 512)],
    "is of a block that is not in use after it": [an_entry("alloc", 32 * MiB, 512)],
    "is of a block that overlaps another": [an_entry("free_completed", MiB, 512)],
    "takes memory in which a block is in use before it": [an_entry("segment_alloc", 0, 12 * MiB)],
    "takes memory that is not held after it": [an_entry("segment_map", 2**30, 2 * MiB)],
    "is of memory that is still held after it": [an_entry("segment_free", 32 * MiB, 2 * MiB)],
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_trace_with_gaps_is_refused(what):
    """Where the trace does not lead to the segments, the entry is named."""
    shot = a_snapshot(a_step()["segments"], CONTRADICTIONS[what])

    with pytest.raises(UserError, match=f"entry 0 of the trace .* {what}: entries are missing; record with every"):
        state_before(checked(shot))


@given(traces(close=True), SETTINGS)
def test_nothing_is_alive_in_a_trace_that_frees_everything(events, settings):
    shot = snapshot(events, settings)
    assume(not ran_out(shot))

    found = lock_step(checked(shot))

    assert 0 == [found.before, *found.after][-1].allocated
