"""The largest batch and the longest sequence that fit a card, by predicted cells on both sides of the boundary.

A trace does not depend on the card's size, so cards share it.
"""

from __future__ import annotations

import gc
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from meftbench.catalogue.profiles import Profile
from meftbench.measuring.build import AUTOCAST
from meftbench.methods import Applied
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings, replay
from meftbench.prediction.predict import Predicted, predict
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.trace import uncomputed_model

Axis = Literal["batch_size", "sequence_length"]
# The tokens themselves are held here: more are not asked about.
MOST_TOKENS = 2**24
CLOSE = 2
NEAR = 4096  # a limit that is looked at at once


class Shape:
    """A predicted cell, held against cards. found: on a card without an end.

    needed: bytes reserved on a card without an end; no card of as many refuses it.  least: bytes allocated; no card of
    fewer takes it.
    """

    def __init__(self, found: Predicted, settings: AllocatorSettings) -> None:
        self._events, self._settings = found.events, settings
        self.needed, self.least = found.replayed.reserved_peak, found.replayed.allocated_peak
        self._fits: dict[int, bool] = {}

    def fits(self, capacity: int) -> bool:
        """Whether torch's allocator gets by with `capacity` bytes; it gives back what it has cached before it fails."""
        if self.needed <= capacity:
            return True
        if self.least > capacity:
            return False
        if capacity not in self._fits:
            self._fits[capacity] = replay(self._events, replace(self._settings, capacity=capacity)).oom is None
        return self._fits[capacity]

    def enough(self, within: int) -> int:
        """About the smallest card that takes it, off by at most `within` bytes: to guess by, nothing is decided so."""
        low, high = self.least, self.needed
        while high - low > within:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(middle) else (middle, high)
        return high


class Shapes:
    """The shapes of one method, each traced once. cell: gives everything but the shape."""

    def __init__(self, cell: Cell, profile: Profile, settings: AllocatorSettings) -> None:
        self._cell, self._profile, self._settings = cell, profile, settings
        self._known: dict[tuple[int, int], Shape] = {}
        self._remembered = Remembered()
        self._applied: Applied | None = None

    @property
    def traced(self) -> int:
        return len(self._known)

    def at(self, batch_size: int, sequence_length: int) -> Shape:
        """Raises UserError as `predict` does."""
        key = (batch_size, sequence_length)
        if key not in self._known:
            sizes = {"batch_size": batch_size, "micro_batch_size": batch_size, "sequence_length": sequence_length}
            cell = self._cell.model_copy(update=sizes)
            # No capacity: the cards' own are asked of the replay.
            endless = replace(self._settings, capacity=None)
            if self._applied is None and cell.precision not in AUTOCAST:
                self._applied = uncomputed_model(cell)
            found = predict(cell, self._profile, settings=endless, remembered=self._remembered, applied=self._applied)
            self._known[key] = Shape(found, self._settings)
            gc.collect()
            gc.freeze()  # its events are kept, and are not to be walked at every step of every later trace
        return self._known[key]

    def along(self, axis: Axis, at: int) -> Callable[[int], Shape]:
        """The shapes where the other axis is `at`."""
        return (lambda size: self.at(size, at)) if axis == "batch_size" else (lambda size: self.at(at, size))


def largest(shape: Callable[[int], Shape], capacities: Iterable[int], limit: int) -> list[int]:
    """For each capacity the size n, up to `limit`, with which the shape fits and with n + 1 does not; 0: none fits.

    Both were predicted. Where memory does not grow with size everywhere, there may be more such sizes than one.
    """
    known: list[int] = []

    def look(size: int) -> Shape:
        if size not in known:
            insort(known, size)
        return shape(size)

    # Two places for the first line. A limit that is near is one of them: most cards that reach it need no other.
    for first in (1, min(4, limit)) if limit > NEAR else (max(1, limit // 4), limit):
        look(first)
    found = []
    for capacity in capacities:
        low = max((size for size in known if shape(size).fits(capacity)), default=0)
        high = min((size for size in known if size > low), default=limit + 1)
        tries = 0
        while high - low > 1:
            size = _guess(known, shape, capacity)
            if high <= limit and tries % 4 == 3:
                size = (low + high) // 2  # where the line through both sides does not help, halves do
            elif low in known and size - low <= CLOSE:
                size = low + 1  # what is guessed from what was just looked at is right, or nearly
            elif high <= limit and high - size <= CLOSE:
                size = high - 1
            size = min(max(size, low + 1), high - 1)
            low, high = (size, high) if look(size).fits(capacity) else (low, size)
            tries += 1
        found.append(low)
    return found


def _guess(known: list[int], shape: Callable[[int], Shape], capacity: int) -> int:
    """Where a line through the two nearest sizes meets the capacity; what a card must have is nearly such a line."""
    if len(known) == 1:
        return known[0]
    first, last = shape(known[0]), shape(known[-1])
    within = max((last.needed - first.needed) // (known[-1] - known[0]) // 4, 1)
    after = bisect_right(known, capacity, key=lambda size: shape(size).enough(within))
    after = min(max(after, 1), len(known) - 1)
    left, right = known[after - 1], known[after]
    at_left, at_right = shape(left).enough(within), shape(right).enough(within)
    if at_right <= at_left:  # there the optimizer needs the most, whatever the size
        return 4 * right if capacity >= at_right else 0
    return left + (right - left) * (capacity - at_left) // (at_right - at_left)
