"""The largest batch and the longest sequence that fit a card, found by predicting cells on both sides of the boundary.

A trace does not depend on how much memory a card has, so cards share it.
"""

from __future__ import annotations

import gc
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from meftbench.catalogue.profiles import Profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings, Replayed
from meftbench.prediction.predict import Predicted, predict
from meftbench.prediction.tracer import Tracer

Axis = Literal["batch_size", "sequence_length"]
NARROWS = 32  # beside a guess, so small a part of what is open is left aside
NEAR = 4096  # a limit up to here is one of the first sizes predicted


class Shape:
    """A predicted cell, to be compared with cards. predicted: for a card with unlimited memory.

    needed: peak reserved bytes on that card: a card with as many fits the cell.  least: peak allocated bytes: a card
    with fewer does not fit it.
    """

    def __init__(self, predicted: Predicted, settings: AllocatorSettings) -> None:
        self.predicted, self._settings = predicted, settings
        self.needed, self.least = predicted.replayed.reserved_peak, predicted.replayed.allocated_peak
        self._fits: dict[int, bool] = {}

    def fits(self, capacity: int) -> bool:
        """Whether `capacity` bytes suffice for torch's allocator; it gives back cached memory before it fails."""
        if self.needed <= capacity:
            return True
        if self.least > capacity:
            return False
        if capacity not in self._fits:
            self._fits[capacity] = self.on_card(capacity).oom is None
        return self._fits[capacity]

    def on_card(self, capacity: int) -> Replayed:
        """The allocator's statistics where torch may reserve `capacity` bytes."""
        return self.predicted.replayed_in(replace(self._settings, capacity=capacity))


class Shapes:
    """The shapes of one method, each traced once. cell: everything but the shape is taken from it.

    tracer: of the same profile and versions, which may have traced other cells; None: a new one.
    """

    def __init__(
        self,
        cell: Cell,
        profile: Profile,
        settings: AllocatorSettings,
        versions: Versions = NOW,
        tracer: Tracer | None = None,
    ) -> None:
        self._cell, self._profile, self._settings, self._versions = cell, profile, settings, versions
        self._known: dict[tuple[int, int, int], Shape] = {}
        self._tracer = tracer or Tracer(profile, versions)
        self._traced_before = self._tracer.traced

    @property
    def traced(self) -> int:
        """How many cells were traced, those of fewer layers among them."""
        return self._tracer.traced - self._traced_before

    def at(self, batch_size: int, sequence_length: int, micro_batch_size: int | None = None) -> Shape:
        """micro_batch_size: None: that of the batch. Raises UserError as `predict` does."""
        key = (batch_size, sequence_length, micro_batch_size or batch_size)
        if key not in self._known:
            sizes = dict(zip(("batch_size", "sequence_length", "micro_batch_size"), key, strict=True))
            cell = self._cell.model_copy(update=sizes)
            # Without a capacity: `Shape.fits` replays the trace with those of the cards.
            unlimited = replace(self._settings, capacity=None)
            predicted = predict(cell, self._profile, settings=unlimited, tracer=self._tracer, versions=self._versions)
            self._known[key] = Shape(predicted, self._settings)
            gc.collect()
            gc.freeze()  # so that no collection in a later trace goes through the kept events
        return self._known[key]

    def along(self, axis: Axis, at: int) -> Callable[[int], Shape]:
        """The shapes along `axis`, as a function of the size on it; the other axis stays at `at`."""
        return (lambda size: self.at(size, at)) if axis == "batch_size" else (lambda size: self.at(at, size))


def largest(
    shape: Callable[[int], Shape], capacities: Iterable[int], limit: int, first: Sequence[int] | None = None
) -> list[int]:
    """For each capacity the size n, up to `limit`, with which the shape fits and with n + 1 does not; 0: none fits.


    first: sizes that are predicted first, for a line through them; None: the limit is one of them where it is small,
    as most cards that fit it need no other.

    Both were predicted, if between 1 and `limit`. Where memory does not grow with size everywhere, there may be more
    such sizes than one.
    """
    known: list[int] = []

    def predict_at(size: int) -> Shape:
        if size not in known:
            insort(known, size)
        return shape(size)

    for size in first or ((1, min(4, limit)) if limit > NEAR else (max(1, limit // 4), limit)):
        predict_at(size)
    sizes = []
    for capacity in capacities:
        low = max((size for size in known if shape(size).fits(capacity)), default=0)
        high = min((size for size in known if size > low), default=limit + 1)
        tries, fitted = 0, False
        while high - low > 1:
            near = max(1, (high - low) // NARROWS)
            if high > limit:  # with memory given back under way, more may fit than the line says
                size = max(_guess(known, shape, capacity, low, high), low + 1 + low // 8)
            elif tries % 3 == 0:
                size = _guess(known, shape, capacity, low, high)
            elif tries % 3 == 1:  # a guess is right, or nearly: the other side of it is looked at
                size = low + near if fitted else high - near
            else:
                size = (low + high) // 2
            size = min(max(size, low + 1), high - 1)
            fitted = predict_at(size).fits(capacity)
            low, high = (size, high) if fitted else (low, size)
            tries += 1
        sizes.append(low)
    return sizes


def _guess(known: list[int], shape: Callable[[int], Shape], capacity: int, low: int, high: int) -> int:
    """The size at which a line through two sizes meets the capacity: the memory needed is nearly linear. They are
    `low`, which fits, and `high`, which does not, or else the nearest that are known."""
    if len(known) == 1:
        return known[0]
    after = min(max(bisect_left(known, high), 1), len(known) - 1)
    left, right = known[after - 1], known[after]
    at_left, at_right = shape(left).needed, shape(right).needed
    if at_right <= at_left:  # the peak lies in the optimizer, whose memory does not depend on the size
        return 4 * right if capacity >= at_right else low
    return left + (right - left) * (capacity - at_left) // (at_right - at_left)
