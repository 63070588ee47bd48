"""A trace replayed through the rules of torch's CUDA caching allocator: every rule with its answer by hand."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.cuda import _memory_viz

from meftbench.errors import UserError
from meftbench.prediction.allocator import AllocatorSettings, Event, Levels, replay, snapshot
from meftbench.units import KiB, MiB

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def a_trace(*steps):
    """("a", 5) allocates 5 MiB as a, "-a" frees it, "forward:" begins that phase."""
    events = []
    for step in steps:
        if isinstance(step, tuple):
            name, mebibytes = step
            events.append(
                Event("alloc", int.from_bytes(name.encode()), int(mebibytes * MiB), "activations", f"aten::{name}")
            )
        elif step.endswith(":"):
            events.append(Event("phase", 0, 0, step[:-1]))
        else:
            events.append(Event("free", int.from_bytes(step[1:].encode()), 0))
    return events


def reserved(*steps, settings=AllocatorSettings()):  # noqa: B008 - frozen
    return replay(a_trace(*steps), settings).reserved_peak / MiB


def test_nothing_reserves_nothing():
    """No events, and a storage of no bytes, which never reaches torch's allocator."""
    for events in ([], [Event("alloc", 1, 0), Event("free", 1, 0)]):
        found = replay(events)
        assert (0, 0, 0, 0, 0.0) == (
            found.reserved_peak,
            found.allocated_peak,
            found.segments,
            found.device_allocs,
            found.fragmentation,
        )


def test_requests_are_rounded_to_512_bytes():
    """1 -> 512 and 513 -> 1024: 1536 of 514 bytes, in one small segment of 2 MiB."""
    found = replay([Event("alloc", 1, 1), Event("alloc", 2, 513)])

    assert (514, 1536, 1536, 2 * MiB) == (
        found.requested_peak,
        found.allocated_peak,
        found.active_peak,
        found.reserved_peak,
    )


def test_small_requests_share_segments_of_2_mib():
    """Two of 700 KiB leave 648 KiB of 2 MiB: the third opens another."""
    found = replay([Event("alloc", key, 700 * KiB) for key in range(3)])

    assert (4 * MiB, 2, 2) == (found.reserved_peak, found.segments, found.device_allocs)


def test_512_bytes_are_split_off_a_small_block():
    """1 MiB, 1 MiB - 512 and 512 bytes fill a segment of 2 MiB."""
    assert 2 == reserved(("a", 1), ("b", 1 - 512 / MiB), ("c", 512 / MiB))


def test_requests_between_1_and_10_mib_share_segments_of_20_mib():
    """Four of 5 MiB fill 20 MiB; the fifth opens another."""
    assert 20 == reserved(*((name, 5) for name in "abcd"))
    assert 40 == reserved(*((name, 5) for name in "abcde"))


def test_from_10_mib_a_request_has_its_own_segment_in_steps_of_2_mib():
    assert 10 == reserved(("a", 10))
    assert 12 == reserved(("a", 10 + 1 / 2048))
    assert 12 + 14 == reserved(("a", 12), ("b", 13))


def test_a_remainder_of_up_to_1_mib_is_not_split_off_a_large_block():
    """11 of 12 MiB leave 1 MiB, which stays with the block; 10.5 leave 1.5, which is split off."""
    assert 12 * MiB == replay(a_trace(("a", 11))).allocated_peak
    assert 10.5 * MiB == replay(a_trace(("a", 10.5))).allocated_peak


def test_the_pools_are_apart():
    """A free large segment does not serve 1 MiB: 20 + 2. One byte more is a large request, and it does."""
    assert 22 == reserved(("a", 5), "-a", ("b", 1))
    assert 20 == reserved(("a", 5), "-a", ("b", 1 + 1 / MiB))


def test_the_smallest_free_block_that_fits_is_taken():
    """12 goes into the free 12, not the 16 that lies before it, so that 16 fits again: 28 in all."""
    assert 28 == reserved(("a", 16), ("b", 12), "-a", "-b", ("c", 12), ("d", 16))


def test_of_equal_blocks_the_lowest_address_is_taken():
    trace = snapshot(a_trace(("a", 12), ("b", 12), "-b", "-a", ("c", 12)))["device_traces"][0]

    first, _, again = [entry["addr"] for entry in trace if entry["action"] == "alloc"]
    assert first == again


def test_free_neighbours_become_one_block():
    """Of four times 5 MiB in 20, two neighbours make room for 9; two apart do not, and 20 more are reserved."""
    full = [(name, 5) for name in "abcd"]
    assert 20 == reserved(*full, "-a", "-b", ("e", 9))
    assert 20 == reserved(*full, "-b", "-a", ("e", 9))
    assert 40 == reserved(*full, "-a", "-c", ("e", 9))


def test_fragmentation_is_of_the_fullest_moment_at_the_reserved_peak():
    """40 MiB are reserved when b, d and 9 MiB are held: 19 of 40. Before, 20 of 20 were held."""
    found = replay(a_trace(*((name, 5) for name in "abcd"), "-a", "-c", ("e", 9), "-e", "-b"))

    assert 1 - 19 / 40 == found.fragmentation
    assert 20 * MiB == found.allocated_peak


SPLIT_32 = AllocatorSettings(max_split_size=32 * MiB)


def test_blocks_above_max_split_size_are_not_split():
    """A free 40 does not serve 10 (40 + 10). It serves 33, whole, so that 3 need 20 more; a free 60 does not serve 33:
    it is 27 > 20 larger."""
    assert 40 == reserved(("a", 40), "-a", ("b", 10))
    assert 50 == reserved(("a", 40), "-a", ("b", 10), settings=SPLIT_32)
    assert 40 == reserved(("a", 40), "-a", ("b", 33), settings=SPLIT_32)
    assert 40 + 20 == reserved(("a", 40), "-a", ("b", 33), ("c", 3), settings=SPLIT_32)
    assert 60 + 34 == reserved(("a", 60), "-a", ("b", 33), settings=SPLIT_32)


def test_one_unsplit_block_that_is_large_enough_goes_back_when_the_device_is_full():
    """90 + 28 > 100. The least free block of at least 32 is the 40: 50 + 28 remain, and no retry is counted."""
    settings = AllocatorSettings(max_split_size=32 * MiB, capacity=100 * MiB)
    found = replay(a_trace(("a", 40), ("b", 50), "-a", "-b", ("c", 28)), settings)

    assert (78 * MiB, 90 * MiB, 0) == (found.reserved, found.reserved_peak, found.retries)


def test_several_unsplit_blocks_go_back_largest_first():
    """112 + 70 > 120, and no block has 70: the 40 and the 38 go (78 >= 70), the 34 stays: 34 + 70."""
    settings = AllocatorSettings(max_split_size=32 * MiB, capacity=120 * MiB)
    found = replay(a_trace(("a", 34), ("b", 38), ("c", 40), "-a", "-b", "-c", ("d", 70)), settings)

    assert (104 * MiB, 0) == (found.reserved, found.retries)


def test_a_full_device_gets_all_unused_segments_back():
    """24 of 24 are reserved and free, in two pieces; 20 fit only after both went back."""
    found = replay(a_trace(("a", 12), ("b", 12), "-a", "-b", ("c", 20)), AllocatorSettings(capacity=24 * MiB))

    assert (20 * MiB, 24 * MiB, 1, None) == (found.reserved, found.reserved_peak, found.retries, found.oom)


def test_a_segment_in_use_does_not_go_back():
    """5 MiB hold a segment of 20, and 20 + 16 > 30: the replay ends there, and says where."""
    events = a_trace(("a", 5), ("b", 16), "-a", ("c", 100))
    found = replay(events, AllocatorSettings(capacity=30 * MiB))

    assert events[1] == found.oom
    assert (5 * MiB, 20 * MiB, 1) == (found.allocated_peak, found.reserved, found.retries)


def test_old_unused_segments_are_collected_above_the_threshold():
    """Threshold 50 of 200 MiB; when 40 are asked for, 72 are reserved, and two blocks of 30 are free. One has seen two
    searches since it was freed, the other one: the mean is 1.5, the older goes, and with 30 >= 22 that is enough:
    42 + 40. Of two that are equally old, both are as old as the mean: only the 40 and 12 remain."""
    settings = AllocatorSettings(garbage_collection_threshold=0.25, capacity=200 * MiB)
    one_older = [("d", 12), ("a", 30), ("b", 30), "-a", "-d", ("e", 12), "-b", ("c", 40)]
    alike = [("d", 12), ("a", 30), ("b", 30), "-a", "-b", ("c", 40)]

    assert (82, 52) == tuple(replay(a_trace(*steps), settings).reserved // MiB for steps in (one_older, alike))
    for off in (AllocatorSettings(capacity=200 * MiB), AllocatorSettings(garbage_collection_threshold=0.25)):
        assert 112 == reserved(*one_older, settings=off)


def test_an_expandable_segment_grows_by_what_is_missing():
    """5 -> a page of 20. 18 -> 15 are free at its end, a page more: 40. Freed, it is one block, and 36 fit.
    In segments of their own: 20 + 18 + 36."""
    steps = [("a", 5), ("b", 18), "-a", "-b", ("c", 36)]
    found = replay(a_trace(*steps), EXPANDABLE)

    assert (40 * MiB, 1, 2) == (found.reserved_peak, found.segments, found.device_allocs)
    assert 74 == reserved(*steps)
    assert 4 == reserved(("a", 1), ("b", 1), ("c", 1), settings=EXPANDABLE)


def test_an_expandable_large_pool_splits_off_512_bytes():
    """19.5 of a page of 20 leave 0.5, which would stay with the block in a segment of its own."""
    assert 19.5 * MiB == replay(a_trace(("a", 19.5)), EXPANDABLE).allocated_peak


def test_an_expandable_segment_keeps_its_growing_end_for_last():
    """Held: 4, a hole of 7, 4, and 5 free at the end, which can grow: 5 goes into the hole, though the end fits."""
    trace = snapshot(a_trace(("a", 4), ("b", 7), ("c", 4), "-b", ("d", 5)), EXPANDABLE)["device_traces"][0]

    at = [entry["addr"] for entry in trace if entry["action"] == "alloc"]
    assert at[1] == at[3]


def test_pages_of_an_expandable_segment_move_when_the_device_is_full():
    """Capacity 60. 30 and 5 map 40. 30 are freed and 40 asked for: the page that is wholly free goes (20 left), and
    two are mapped behind the 5 that were free at the end: 60. What is mapped begins 20 later and has no gap."""
    settings = AllocatorSettings(expandable_segments=True, capacity=60 * MiB)
    found = replay(a_trace(("a", 30), ("b", 5), "-a", ("c", 40)), settings)

    assert (60 * MiB, 1, 1, None) == (found.reserved, found.segments, found.retries, found.oom)


def test_an_emptied_expandable_segment_is_gone():
    """Capacity 40: 2 pages of 20 are free when 2 MiB in the small pool are asked for."""
    settings = AllocatorSettings(expandable_segments=True, capacity=40 * MiB)
    found = replay(a_trace(("a", 40), "-a", ("b", 1), ("c", 30)), settings)

    assert (2 * MiB, 1) == (found.reserved, found.segments)
    assert "c" in found.oom.origin  # 2 + 40 in pages of 20


def test_each_phase_has_its_own_peak():
    """forward reserves 12 and backward 14 more, both of which stay reserved: the next step begins with 28. The block
    of 11.5 MiB has all of its segment, as 512 KiB are not split off."""
    step = ("forward:", ("a", 11.5), "backward:", ("b", 14), "-a", "-b")
    (found,) = replay(a_trace(("p", 1), *step), starts=[1]).steps

    assert found.baseline == Levels(1 * MiB, 1 * MiB, 2 * MiB)
    assert {
        "forward": Levels(13 * MiB, 12.5 * MiB, 14 * MiB),
        "backward": Levels(27 * MiB, 26.5 * MiB, 28 * MiB),
    } == found.phases
    assert (27 * MiB, 26 * MiB) == (found.peak.allocated, found.activation_peak)

    again = replay(a_trace(("p", 1), *step, *step), starts=[1, 7]).steps[1]
    assert (1 * MiB, 28 * MiB) == (again.baseline.allocated, again.phases["forward"].reserved)


def test_memory_that_is_given_back_between_steps_is_not_reserved_by_the_next():
    """empty_cache before event 7: of 28 MiB only those of p stay."""
    step = ("forward:", ("a", 12), "backward:", ("b", 14), "-a", "-b")
    found = replay(a_trace(("p", 1), *step, "forward:", ("c", 10), "backward:"), starts=[1, 7], settled=7)

    assert (28 * MiB, 12 * MiB) == tuple(each.peak.reserved for each in found.steps)
    assert 2 * MiB == found.steps[1].baseline.reserved


def test_settings_that_came_later():
    """Segments of 12 MiB (a setting of torch 2.13, not of 2.6) hold two of 5. Octaves: 33 of 32 to 64 MiB, in four, is
    40; 65, in one, is 66 for the segment's sake."""
    assert 24 == reserved(*((n, 5) for n in "abc"), settings=AllocatorSettings.parse("large_segment_size_mb:12"))
    octaves = AllocatorSettings.parse("roundup_power2_divisions:[32:4,>:1]")
    assert (40, 66) == (reserved(("a", 33), settings=octaves), reserved(("a", 65), settings=octaves))
    # torch 2.13's own test of its parser (c10/test/core/AllocatorConfig_test.cpp)
    divisions = AllocatorSettings.parse("roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1]")
    assert (8,) * 7 + (2, 4, 2, 4) + (1,) * 5 == divisions.roundup_power2_divisions


def test_a_trace_that_is_none_is_a_bug():
    for events in ([Event("free", 1, 0)], a_trace(("a", 1), ("a", 1)), [Event("grow", 1, 1)], [Event("alloc", 1, -1)]):
        with pytest.raises(ValueError, match=r"storage|kind"):
            replay(events)


def test_segments_of_their_own_may_grow_on_a_second_identical_step():
    """3 (of 20), 18, 17 (the rest of the 20): 38. Then 3 breaks the 18, 18 breaks the 20, and 17 needs 18 more."""
    step = [("a", 3), ("b", 18), ("c", 17), "-a", "-b", "-c"]

    assert 38 == reserved(*step)
    assert 38 + 18 == reserved(*step, *step)
    assert reserved(*step, settings=EXPANDABLE) == reserved(*step, *step, settings=EXPANDABLE)


def test_parse():
    parse = AllocatorSettings.parse
    assert AllocatorSettings() == parse("")
    assert AllocatorSettings(True, 128 * MiB, 0.8) == parse(
        "expandable_segments:True, max_split_size_mb:128,garbage_collection_threshold:0.8"
    )
    assert 30 * MiB == parse("max_non_split_rounding_mb:30").max_non_split_rounding_size
    with pytest.raises(UserError, match="did you mean 'expandable_segments'"):
        parse("expandable_segmnets:True")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expandable_segments:yes", "True or False"),
        ("expandable_segments", "key:value"),
        ("max_split_size_mb:19", "at least 20"),
        ("max_split_size_mb:lots", "whole number of MiB"),
        ("max_split_size_mb:", "whole number of MiB"),
        ("large_segment_size_mb:10", "more than 10"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:-0.5", "between 0 and 1"),
        ("roundup_power2_divisions:3", "power of 2"),
        ("roundup_power2_divisions:[48:4]", "power of 2"),
        ("max_non_split_rounding_mb:1", "at least 20"),
    ],
)
def test_nonsense_is_one_line_and_nonsense_to_torch(text, says):
    """torch's own parser, which a CPU build has too, refuses the same settings."""
    with pytest.raises(UserError, match=says) as caught:
        AllocatorSettings.parse(text)
    assert "\n" not in str(caught.value)

    before = torch._C._accelerator_getAllocatorSettings()
    with pytest.raises((ValueError, RuntimeError)):
        torch._C._accelerator_setAllocatorSettings(text)
    torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize("settings", [AllocatorSettings(), EXPANDABLE], ids=["default", "expandable"])
def test_a_snapshot_is_one_to_torchs_own_viewer(settings):
    """torch.cuda._memory_viz sums it (and checks every sum), prints its trace, and makes its pages and flame graphs."""
    events = a_trace("forward:", ("a", 5), ("b", 30), ("c", 0.5), "-b", "backward:", ("d", 40))
    shot = pickle.loads(pickle.dumps(snapshot(events, settings)))

    total = replay(events, settings).reserved / MiB
    assert f"total_reserved: {total}MiB" in _memory_viz.segsum(shot)
    assert "del" in _memory_viz.trace(shot)
    assert "aten::d" in _memory_viz.segments(shot, format_flamegraph=str)
    assert "phase:0:forward" in _memory_viz.memory(shot, format_flamegraph=str)
    for plot in (_memory_viz.trace_plot, _memory_viz.segment_plot):
        assert "snapshot.pickle" in plot(shot)
    kept = _memory_viz.filter_alloc_free_pairs(shot)["device_traces"][0]
    assert 3 == sum(entry["action"] == "alloc" for entry in kept)  # a, c and d live on
    assert {"activations"} == {entry["category"] for entry in kept if entry["action"] == "alloc"}


def test_a_snapshot_of_what_does_not_fit_ends_with_the_failure():
    shot = snapshot(a_trace(("a", 12), ("b", 30), ("c", 1)), AllocatorSettings(capacity=40 * MiB))

    last = shot["device_traces"][0][-1]
    assert ("oom", 30 * MiB, 28 * MiB) == (last["action"], last["size"], last["device_free"])
    assert "OutOfMemoryError" in _memory_viz.trace(shot)
