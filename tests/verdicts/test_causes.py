"""Changes of one cell and cause are told as one, and none is lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meftbench.verdicts.causes import told
from meftbench.verdicts.change import UNMOVED, Change

METRICS = ("peak_allocated_bytes", "saved_bytes", "optimizer_bytes", "step_time_s", "tokens_per_s", "gradient_rel_max")
changes_of_cells = st.lists(
    st.builds(
        lambda cell_id, metric, judgement, delta: Change(cell_id, cell_id, metric, judgement, "counted", 5, 5 + delta),
        st.sampled_from(["a", "b"]),
        st.sampled_from(METRICS),
        st.sampled_from(["worse", "better", "noise", "same"]),
        st.sampled_from([1, 2, -1]),
    ),
    unique_by=lambda change: (change.cell_id, change.metric),
)


@given(changes=changes_of_cells)
def test_every_change_is_told_once(changes):
    """As the one that leads, or behind it; what did not change is not told."""
    items = told(changes)

    told_metrics = [(item.change.cell_id, name) for item in items for name in (item.change.metric, *item.also)]
    assert Counter(told_metrics) == Counter((c.cell_id, c.metric) for c in changes if c.judgement not in UNMOVED)


@given(changes=changes_of_cells)
def test_bytes_that_are_told_together_changed_alike(changes):
    """In one cell, by the same number, judged alike."""
    by_place = {(change.cell_id, change.metric): change for change in changes}

    for item in told(changes):
        behind = [by_place[item.change.cell_id, name] for name in item.also]
        assert {change.judgement for change in behind} <= {item.change.judgement}
        if item.change.metric.endswith("_bytes"):
            assert {change.delta for change in behind} <= {item.change.delta}


def test_the_peak_leads_and_its_place_is_that_of_its_own_share():
    """An order by the largest share of any metric would put a small cell's trifles first."""
    changes = [
        Change("a", "a", "saved_bytes", "worse", "counted", 1, 11),
        Change("b", "b", "peak_allocated_bytes", "worse", "counted", 10, 20),
        Change("a", "a", "peak_allocated_bytes", "worse", "counted", 100, 110),
    ]

    assert [(item.change.cell_id, item.change.metric, item.also) for item in told(changes)] == [
        ("b", "peak_allocated_bytes", ()),
        ("a", "peak_allocated_bytes", ("saved_bytes",)),
    ]
