"""A predicted step held against a recorded one."""

from __future__ import annotations

import pytest

from meftbench.errors import UserError
from meftbench.report.views.validation import snapshot_validation_lines
from meftbench.verdicts.snapshot_validation import validate_snapshot

MiB = 2**20
PREDICTED = {"label": "m/full/b1/s8", "requested": [1, 2, 3 * MiB, 4], "origins": ["a", "b", "mm.default", "d"]}
PREDICTED |= {"peak_above_bytes": 3 * MiB, "device": "NVIDIA L40S"}


def recorded(*requested, peak=4 * MiB):
    return {"requested": [*requested], "peak_above_bytes": peak}


def test_what_one_of_both_has_alone_is_listed_by_bytes():
    """512 twice and 7 once are only measured; 3 MiB and 4 bytes only predicted."""
    found = validate_snapshot("s.pickle", recorded(1, 512, 2, 512, 7), PREDICTED)

    assert (5, 4, 2) == (found.recorded, found.predicted, found.common)
    assert [(512, 2, ""), (7, 1, "")] == [(r.requested_bytes, r.count, r.origin) for r in found.only_recorded]
    assert [(3 * MiB, 1, "mm.default"), (4, 1, "d")] == [
        (r.requested_bytes, r.count, r.origin) for r in found.only_predicted
    ]
    assert -0.25 == found.error


def test_it_is_said_with_units_and_how_each_number_was_obtained():
    found = validate_snapshot("s.pickle", recorded(1, 2, 4), PREDICTED, "torch 2.13")
    text = "\n".join(snapshot_validation_lines(found))

    assert "predicted by the rules of NVIDIA L40S, torch 2.13" in text
    assert "3 of 4 predicted (75.0%), and of 3 in the snapshot" in text
    assert "4.0 MiB in the snapshot, 3.0 MiB predicted, error -25.00%" in text
    assert "only predicted, the most bytes first" in text
    assert "1 times, mm.default" in text
    assert "only in the snapshot" not in text


def test_a_snapshot_without_a_trace_says_how_to_record_one():
    with pytest.raises(UserError, match=r"has no trace of allocations.*_record_memory_history") as caught:
        validate_snapshot("s.pickle", recorded(), PREDICTED)
    assert 4 == caught.value.exit_code


def test_another_step_is_not_compared():
    """Two thousand allocations of other sizes: how many there are, and how high both peaks."""
    said = r"another step: 2,000 allocations with a peak of 4\.0 MiB.* 2,000 with 3\.0 MiB predicted, of which 0 have"
    with pytest.raises(UserError, match=said) as caught:
        validate_snapshot("s.pickle", recorded(*range(10**6, 10**6 + 2000)), PREDICTED | {"requested": [*range(2000)]})
    assert 4 == caught.value.exit_code
