"""Traces of allocations and settings of the allocator, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from meftbench.prediction.allocator import AllocatorSettings, Event
from meftbench.units import MiB


@st.composite
def traces(draw, close=False):
    size = st.one_of(
        st.integers(1, 2 * MiB),
        st.integers(1, 40).map(lambda n: n * MiB),
        st.sampled_from([512, 513, MiB, MiB + 1, 10 * MiB - 1, 10 * MiB, 19 * MiB, 20 * MiB]),
    )
    events, live = [], []
    for key, (nbytes, frees, which) in enumerate(
        draw(st.lists(st.tuples(size, st.booleans(), st.integers(0, 99)), max_size=40))
    ):
        if frees and live:
            events.append(Event("free", live.pop(which % len(live)), 0))
        events.append(Event("alloc", key, nbytes))
        live.append(key)
    return events + [Event("free", key, 0) for key in live if close]


SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_size=st.sampled_from([None, 20 * MiB, 32 * MiB]),
    garbage_collection_threshold=st.sampled_from([0, 0.3, 0.8]),
    capacity=st.sampled_from([None, 30 * MiB, 100 * MiB, 250 * MiB]),
)
