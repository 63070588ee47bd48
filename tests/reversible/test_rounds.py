"""Rounds of a loop that are alike: all are run, or a trace runs the first and is told of the others."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from meftbench.reversible.rounds import RUN, left_out_by, rounds


class Noted:
    """What a trace was told. begins: of the last round of each size, the number of the rounds before it."""

    def __init__(self):
        self.run, self.told = 0, []

    def round_begins(self):
        return self.run

    def left_out(self, rounds, begun):
        self.told.append((rounds, self.run - begun))


def slices(sizes):
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


@given(sizes=st.lists(st.sampled_from([3, 4]), max_size=60))
def test_rounds_that_are_run_and_those_that_are_told_are_all(sizes):
    """Of each size in a row the first few are run, in order; without a trace all are."""
    parts = slices(sizes)
    noted, run = Noted(), []
    with left_out_by(noted):
        for rows in rounds(parts):
            run.append(rows)
            noted.run += 1

    assert parts == list(rounds(parts))
    assert len(parts) == len(run) + sum(number for number, _ in noted.told)
    assert run == [rows for rows in parts if rows in run]
    assert all(since == 1 and number > 0 for number, since in noted.told)


def test_a_row_of_alike_rounds_is_cut():
    """And the one of another size after it is run."""
    noted = Noted()
    with left_out_by(noted):
        run = list(rounds(slices([4] * 100 + [3])))

    assert RUN + 1 == len(run)
    assert slice(400, 403) == run[-1]
    assert [100 - RUN] == [number for number, _ in noted.told]
