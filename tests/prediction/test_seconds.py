"""The roofline: how seconds follow from work and speeds, whatever both are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.catalogue.operations import Operation, Operator, Work
from meftbench.catalogue.profiles import PROFILES
from meftbench.catalogue.speeds import Rate, Speeds
from meftbench.prediction.calibration import fitted
from meftbench.prediction.host_heap import Heap
from meftbench.prediction.seconds import missing_rate, step_time

GB = 1e9


def speeds(**fields):
    given_fields = {
        "calibrated": True,
        "matrix": {"float32": {"rate": 1e12}},
        "memory": {"elementwise": [[1.0, 100 * GB]]},
        "launch_s": 1e-5,
        "asynchronous": False,
        "link_bytes_per_s": 10 * GB,
        "sources": ["a test"],
    }
    return Speeds.model_validate(given_fields | fields)


def an_operation(
    kind="matrix", phase="forward", place="device", recomputed=False, flops=0, read=0, written=0, launches=1.0
):
    size = (1, 8, 8, 8) if kind == "matrix" else ()
    operator = Operator(kind, kind, "float32", size, flops, read, written, launches)
    return Operation(operator, phase, recomputed, place)


numbers = st.integers(0, 10**12)
operations = st.builds(
    an_operation,
    kind=st.sampled_from(["matrix", "elementwise", "softmax", "fused product"]),
    phase=st.sampled_from(["forward", "backward", "optimizer"]),
    place=st.sampled_from(["device", "moved", "host"]),
    recomputed=st.booleans(),
    flops=numbers,
    read=numbers,
    written=numbers,
    launches=st.floats(0, 4),
)
works = st.builds(Work, st.dictionaries(operations, st.integers(1, 100), max_size=8))


@given(works, st.booleans(), st.integers(2, 9))
def test_time_is_in_proportion_to_work(work, asynchronous, times):
    """So depth, too, extrapolates: and where kernels are started beside others, as well."""
    device = speeds(asynchronous=asynchronous)
    more = Work({operation: count * times for operation, count in work.counts.items()})

    assert times * step_time(work, device).step_s == pytest.approx(step_time(more, device).step_s)


@given(works)
def test_no_step_is_faster_than_its_operations_its_bytes_and_its_launches(work):
    device = speeds(asynchronous=True)
    computed = Work({each: times for each, times in work.counts.items() if each.place == "device"})
    step_s = step_time(work, device).step_s

    assert step_s >= computed.flops / 1e12 * (1 - 1e-9) if all_products(computed) else True
    assert step_s >= computed.moved_bytes / (100 * GB) * (1 - 1e-9)
    assert step_s >= computed.launches * 1e-5 * (1 - 1e-9)
    assert step_s <= step_time(work, speeds(asynchronous=False)).step_s * (1 + 1e-9)


def all_products(work):
    return all(each.operator.kind in ("matrix", "fused product") for each in work.counts)


@given(works)
def test_parts_add_up_and_none_is_negative(work):
    time = step_time(work, speeds())

    assert time.step_s == pytest.approx(sum(time.parts.values()))
    assert min(time.parts.values()) >= 0
    assert 0 <= time.recomputed_s <= time.step_s * (1 + 1e-9)


def test_an_operator_takes_the_longer_of_computing_and_moving():
    bound = {"computing": (10**12, 10**9), "moving": (10**9, 10**11)}

    for flops, moved in bound.values():
        work = Work({an_operation(flops=flops, read=moved, launches=0.0): 1})
        assert max(flops / 1e12, moved / (100 * GB)) == pytest.approx(step_time(work, speeds()).parts["matrix"])


def test_transfers_are_hidden_behind_computation_but_not_in_the_optimizers_step():
    computing = an_operation("elementwise", read=10**11, launches=0.0)  # one second
    for phase, exposed in (("forward", 0.0), ("backward", 0.0), ("optimizer", 0.5)):
        moved = an_operation("elementwise", phase, "moved", written=5 * 10**9, launches=0.0)
        assert exposed == pytest.approx(step_time(Work({computing: 1, moved: 1}), speeds()).parts["transfers"])

    moved = an_operation("elementwise", "backward", "moved", written=3 * 10**10, launches=0.0)
    assert 2.0 == pytest.approx(step_time(Work({computing: 1, moved: 1}), speeds()).parts["transfers"])


def test_a_dtype_without_a_rate_is_named():
    work = Work({an_operation(flops=1): 1})

    assert missing_rate(work, speeds()) is None
    assert "float32" == missing_rate(work, speeds(matrix={"bfloat16": {"rate": 1e12}}))


@given(st.floats(1e6, 1e16), st.lists(st.sampled_from([0.0, 1.0, 8.0, 64.0, 512.0]), min_size=3, max_size=3))
def test_a_rate_is_found_again_from_what_it_gives(rate, half):
    sizes = [(float(m), float(k), float(n)) for m in (8, 256, 4096) for k in (8, 256, 4096) for n in (8, 256, 4096)]
    true = Rate(rate=rate, half=half)

    found = fitted(sizes, [true.at(size) for size in sizes])

    assert half == found.half
    assert rate == pytest.approx(found.rate)


@given(st.floats(1, 1e12))
def test_bandwidth_between_two_sizes_is_between_theirs(written):
    device = speeds(memory={"elementwise": [[1e3, 1 * GB], [1e6, 50 * GB], [1e9, 20 * GB]]})

    assert 1 * GB * (1 - 1e-9) <= device.bandwidth("softmax", written) <= 50 * GB * (1 + 1e-9)
    assert 50 * GB == pytest.approx(device.bandwidth("elementwise", 1e6))


def test_every_shipped_profile_has_speeds():
    """A data sheet's: of single precision, of half, and of memory; what is assumed is said."""
    for profile in PROFILES.values():
        assert profile.speeds is not None
        assert {"float32", "float16"} <= profile.speeds.matrix.keys()
        assert not profile.speeds.calibrated
        assert any("assumed" in source for source in profile.speeds.sources)


MiB = 2**20


def test_what_the_heap_has_room_for_is_not_taken_anew():
    heap = Heap()
    heap.allocate(1, 20 * MiB)
    heap.allocate(2, 4 * MiB)
    heap.free(1)
    heap.allocate(3, 16 * MiB)
    assert 24 * MiB == heap.fresh

    heap.allocate(4, 8 * MiB)  # more than the hole has left
    assert 32 * MiB == heap.fresh


def test_large_blocks_are_pages_of_their_own_each_time():
    heap = Heap()
    for _ in range(3):
        heap.allocate(1, 40 * MiB)
        heap.free(1)
    assert 120 * MiB == heap.fresh


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=30))
def test_a_heap_of_small_blocks_repeats_a_step_without_taking_memory(steps):
    """The same allocations and ends once more need nothing new."""
    heap = Heap()
    for _ in range(2):
        heap.fresh = 0
        alive = []
        for number, (size, ends) in enumerate(steps):
            heap.allocate(number, size * MiB)
            alive.append(number)
            if ends:
                heap.free(alive.pop(0))
        for number in alive:
            heap.free(number)
    assert 0 == heap.fresh
