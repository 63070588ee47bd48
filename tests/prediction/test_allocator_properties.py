"""What holds for every trace replayed through the allocator's rules, and a slow twin that shares none of its code."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given

from allocator_traces import SETTINGS, traces
from meftbench.prediction.allocator import AllocatorSettings, Event, replay, snapshot
from meftbench.units import KiB, MiB

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def slow_reserved(events):
    """The peak of the default settings: segments as lists of [size, key or None], searched from end to end."""
    segments = {True: [], False: []}
    peak = total = 0
    for event in events:
        small = -(-event.nbytes // 512) * 512 <= MiB
        if event.kind == "free":
            for segment in segments[True] + segments[False]:
                for piece in segment:
                    if piece[1] == event.key:
                        piece[1] = None
                merged = []
                for size, key in segment:
                    if merged and key is None and merged[-1][1] is None:
                        merged[-1][0] += size
                    else:
                        merged.append([size, key])
                segment[:] = merged
            continue
        need = -(-event.nbytes // 512) * 512
        fits = [
            (size, at, i)
            for at, segment in enumerate(segments[small])
            for i, (size, key) in enumerate(segment)
            if key is None and size >= need
        ]
        if not fits:
            size = 2 * MiB if small else 20 * MiB if need < 10 * MiB else -(-need // (2 * MiB)) * 2 * MiB
            segments[small].append([[size, None]])
            total += size
            peak = max(peak, total)
            fits = [(size, len(segments[small]) - 1, 0)]
        size, at, i = min(fits)
        rest = size - need
        keep = rest >= 512 if small else rest > MiB
        segments[small][at][i : i + 1] = [[need, event.key], [rest, None]] if keep else [[size, event.key]]
    return peak


@given(traces())
def test_the_replay_is_its_slow_twin(events):
    """Default settings: the same bytes as a list searched from end to end."""
    assert slow_reserved(events) == replay(events).reserved_peak


@given(traces(), SETTINGS)
def test_live_blocks_lie_apart_and_in_reserved_memory(events, settings):
    """At every moment, whatever the settings: no two overlap, all are mapped, no more than the capacity is, and the
    final segments are what was mapped and not given back."""
    mapped, live = {}, {}
    shot = snapshot(events, settings)
    for entry in shot["device_traces"][0]:
        action, at = entry["action"], entry.get("addr")
        if action in ("segment_alloc", "segment_map"):
            mapped |= dict.fromkeys(range(at, at + entry["size"], MiB))  # all are multiples of 1 MiB
        elif action in ("segment_free", "segment_unmap"):
            for page in range(at, at + entry["size"], MiB):
                del mapped[page]
        elif action == "alloc":
            end = at + entry["size"]
            assert not any(at < stop and start < end for start, stop in live.items())
            assert all(page - page % MiB in mapped for page in (*range(at, end, MiB), end - 1))
            live[at] = end
        elif action == "free_completed":
            del live[at]
        assert len(mapped) * MiB <= (settings.capacity or len(mapped) * MiB)
    assert len(mapped) * MiB == sum(segment["total_size"] for segment in shot["segments"])
    assert len(live) == sum(b["state"] == "active_allocated" for s in shot["segments"] for b in s["blocks"])


@given(traces(), SETTINGS)
def test_requested_allocated_reserved(events, settings):
    """requested <= allocated <= active <= reserved, in the peaks of every beginning of a trace, so at every time."""
    for stop in range(len(events) + 1):
        found = replay(events[:stop], settings)
        peaks = (found.requested_peak, found.allocated_peak, found.active_peak, found.reserved_peak)
        assert sorted(peaks) == list(peaks)
        assert 0 <= found.fragmentation <= 1


@given(traces())
def test_no_two_free_blocks_are_neighbours(events):
    for settings in (AllocatorSettings(), EXPANDABLE):
        for segment in snapshot(events, settings)["segments"]:
            free = [block["state"] == "inactive" for block in segment["blocks"]]
            assert not any(a and b for a, b in pairwise(free))


@given(traces(close=True), SETTINGS)
def test_what_is_freed_is_not_allocated(events, settings):
    """All freed: nothing is allocated, and what is reserved is whole."""
    shot = snapshot(events, settings)
    if not any(entry["action"] == "oom" for entry in shot["device_traces"][0]):
        assert all(segment["allocated_size"] == 0 and len(segment["blocks"]) == 1 for segment in shot["segments"])


@given(traces(close=True))
def test_an_expandable_segment_ends_where_its_highest_block_did(events):
    """Without a limit: the pages up to the highest end of a block, and the same trace again maps none more."""
    once, twice = replay(events, EXPANDABLE), replay(events * 2, EXPANDABLE)
    trace = snapshot(events, EXPANDABLE)["device_traces"][0]

    total = 0
    for small, page in ((True, 2 * MiB), (False, 20 * MiB)):
        blocks = [
            (e["addr"], e["addr"] + -(-e["size"] // 512) * 512)
            for e in trace
            if e["action"] == "alloc" and (e["size"] <= MiB) == small
        ]
        if blocks:
            total += -(-(max(end for _, end in blocks) - min(start for start, _ in blocks)) // page) * page
    assert total == once.reserved_peak == twice.reserved_peak


@pytest.mark.parametrize("settings", [AllocatorSettings(), EXPANDABLE], ids=["default", "expandable"])
def test_a_long_trace_is_replayed(settings):
    """200,000 events; that they take seconds and not minutes is for the suite's timeout to see."""
    chance = random.Random(0)
    live, events = [], []
    for key in range(100_000):
        events.append(Event("alloc", key, chance.choice([4096, 300 * KiB, 3 * MiB, 12 * MiB, 24 * MiB])))
        live.append(key)
        if len(live) > 1500:
            events.append(Event("free", live.pop(chance.randrange(len(live))), 0))
    events += [Event("free", key, 0) for key in live]

    found = replay(events, settings)

    assert 200_000 == len(events)
    assert found.oom is None
    assert found.reserved_peak >= found.allocated_peak > 0
