"""The level of live bytes through one step, by category, in few points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MOST = 40  # points at the end: enough to see where memory rises and falls


class Point(NamedTuple):
    """The highest level within a part of a step. phase: in which it was.  live: bytes by category."""

    total: int
    phase: str
    live: dict[str, int]


class LevelHistory:
    """Keeps the highest level of every so many allocations; the more there are, the more share a point.

    Peaks are never lost: of points that are joined, the higher one stays.
    """

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._of_point = 1  # allocations that share a point
        self._seen = 0  # allocations in the last point

    def allocated(self, total: int, phase: str, live: Mapping[str, int]) -> None:
        """Note the level after an allocation."""
        points = self._points
        if not points or self._seen == self._of_point or points[-1].phase != phase:
            if len(points) == 2 * MOST:
                points[:] = [max(points[at : at + 2], key=lambda point: point.total) for at in range(0, 2 * MOST, 2)]
                self._of_point *= 2
            points.append(Point(total, phase, dict(live)))
            self._seen = 0
        elif total > points[-1].total:
            points[-1] = Point(total, phase, dict(live))
        self._seen += 1

    def points(self) -> list[dict[str, Any]]:
        """In order of time, at most MOST: the phase, and the bytes of each category that has any."""
        points, size = self._points, -(-len(self._points) // MOST)
        joined = [max(points[at : at + size], key=lambda point: point.total) for at in range(0, len(points), size or 1)]
        return [{"phase": p.phase, "bytes": {name: size for name, size in p.live.items() if size}} for p in joined]
