"""Two sequences of allocations held against each other: which of them are in both, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Alignment:
    """pairs: positions (in the first, in the second) of what both have, in rising order."""

    pairs: list[tuple[int, int]]

    def only_first(self, length: int) -> list[int]:
        """Positions of the first sequence, of this length, that have no partner."""
        return sorted(set(range(length)) - {first for first, _ in self.pairs})

    def only_second(self, length: int) -> list[int]:
        return sorted(set(range(length)) - {second for _, second in self.pairs})


def aligned(first: Sequence[int], second: Sequence[int], most: int = 1200) -> Alignment | None:
    """A longest common subsequence of both; None: they differ in more than `most` places.

    Source: E. Myers, An O(ND) Difference Algorithm and Its Variations, Algorithmica 1 (1986), the greedy algorithm.
    """
    # furthest[k]: how far the furthest path with so many differences comes in `first` on the diagonal k.
    furthest, history = {1: 0}, []
    for differences in range(min(most, len(first) + len(second)) + 1):
        history.append(dict(furthest))
        for k in range(-differences, differences + 1, 2):
            down = k == -differences or (k != differences and furthest[k - 1] < furthest[k + 1])
            x = furthest[k + 1] if down else furthest[k - 1] + 1
            y = x - k
            while x < len(first) and y < len(second) and first[x] == second[y]:
                x, y = x + 1, y + 1
            furthest[k] = x
            if x >= len(first) and y >= len(second):
                return Alignment(_pairs(history, len(first), len(second)))
    return None


def _pairs(history: list[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    """The diagonal steps of the path that ends at (x, y), from the state before each difference."""
    pairs = []
    for differences in range(len(history) - 1, -1, -1):
        furthest, k = history[differences], x - y
        down = k == -differences or (k != differences and furthest[k - 1] < furthest[k + 1])
        before_k = k + 1 if down else k - 1
        before_x = furthest[before_k]
        before_y = before_x - before_k
        start_x, start_y = (before_x, before_y + 1) if down else (before_x + 1, before_y)
        while x > start_x and y > start_y:
            x, y = x - 1, y - 1
            pairs.append((x, y))
        if differences == 0:
            while x > 0 and y > 0:
                x, y = x - 1, y - 1
                pairs.append((x, y))
        else:
            x, y = before_x, before_y
    return pairs[::-1]
