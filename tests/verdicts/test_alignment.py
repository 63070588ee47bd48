"""A longest common subsequence of two sequences of allocations."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from meftbench.verdicts.alignment import aligned

SEQUENCES = st.lists(st.integers(0, 3), max_size=12)


def length_of_common(first, second):
    """By the textbook's table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(SEQUENCES, SEQUENCES)
def test_it_is_common_in_order_and_as_long_as_can_be(first, second):
    found = aligned(first, second)

    assert length_of_common(first, second) == len(found.pairs)
    assert all(first[one] == second[other] for one, other in found.pairs)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(found.pairs))
    rest = found.only_first(len(first)) + [one for one, _ in found.pairs]
    assert [*range(len(first))] == sorted(rest)
    assert len(second) == len(found.only_second(len(second))) + len(found.pairs)


def test_what_differs_in_too_many_places_is_not_aligned():
    """Up to ten differences are looked for."""
    assert aligned([1] * 20, [2] * 20, most=10) is None
    assert 15 == len(aligned([1] * 20, [1] * 15, most=10).pairs)
