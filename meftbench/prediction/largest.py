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
PARTS = 16  # of the sizes between which a boundary must lie: the first step from a guess
NEAR = 4096  # a limit up to here is one of the first sizes predicted


class Shape:
    """A predicted cell, to be compared with cards. predicted: for a card with unlimited memory."""

    def __init__(self, predicted: Predicted, settings: AllocatorSettings) -> None:
        self.predicted, self._settings = predicted, settings
        self._unlimited: Replayed | None = None  # that of a card with unlimited memory, once it is known
        self._fits: dict[int, bool] = {}

    @property
    def needed(self) -> int:
        """Peak reserved bytes on a card with unlimited memory: a card with as many fits the cell."""
        return self._on_unlimited().reserved_peak

    @property
    def least(self) -> int:
        """Peak allocated bytes: a card with fewer does not fit the cell."""
        return self._on_unlimited().allocated_peak

    def fits(self, capacity: int) -> bool:
        """Whether `capacity` bytes suffice for torch's allocator; it gives back cached memory before it fails."""
        if self._unlimited is not None:
            if self._unlimited.reserved_peak <= capacity:
                return True
            if self._unlimited.allocated_peak > capacity:
                return False
        if capacity not in self._fits:
            replayed = self.on_card(capacity)
            self._fits[capacity] = replayed.oom is None
            if replayed.oom is None and not replayed.retries and not self._settings.garbage_collection_threshold:
                self._unlimited = replayed  # the card was never full, so that more memory would change nothing
        return self._fits[capacity]

    def on_card(self, capacity: int) -> Replayed:
        """The allocator's statistics where torch may reserve `capacity` bytes."""
        return self.predicted.replayed_in(replace(self._settings, capacity=capacity))

    def _on_unlimited(self) -> Replayed:
        if self._unlimited is None:
            self._unlimited = self.predicted.replayed
        return self._unlimited


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
    sizes = list(dict.fromkeys(first or ((1, min(4, limit)) if limit > NEAR else (max(1, limit // 4), limit))))
    known = _Known({size: shape(size) for size in sorted(sizes)})
    found = []
    share = 1.0  # of cached memory that a card must have room for, as it was on the card before
    for capacity in capacities:

        def fits(size: int, capacity: int = capacity) -> bool:
            if size not in known.shapes:
                known.add(size, shape(size))
            return known.shapes[size].fits(capacity)

        first_too_large = bisect_left(known.sizes, True, key=lambda size: not fits(size))
        low, high = [0, *known.sizes, limit + 1][first_too_large : first_too_large + 2]
        more = 0
        while low < limit < high:  # no size that does not fit is known yet
            size = min(max(known.meeting(capacity, share, high), low + 1 + more), limit)
            low, high = (size, high) if fits(size) else (low, size)
            more = low // 8
        low = _boundary(fits, low, high, known.meeting(capacity, share, high), known.spread(capacity, high))
        if 0 < low < limit:
            share = known.share(capacity, low)
        found.append(low)
    return found


def _boundary(fits: Callable[[int], bool], low: int, high: int, guess: int, spread: int) -> int:
    """The size, from `low`, which fits, to `high`, which does not, with which a shape fits, and with the next does not.

    It is looked for at the guess, then away from it in steps that double until it is passed, then by halves. spread: by
    how much the guess may be wrong.
    """
    step, upwards, passed = max(1, spread // PARTS), None, False
    while high - low > 1:
        size = guess if low < guess < high and not passed else (low + high) // 2
        fitted = fits(size)
        low, high = (size, high) if fitted else (low, size)
        passed = upwards not in (None, fitted)
        upwards = fitted if upwards is None else upwards
        guess = size + step if upwards else size - step
        step *= 2
    return low


class _Known:
    """The shapes that were predicted, by size."""

    def __init__(self, shapes: dict[int, Shape]) -> None:
        self.shapes, self.sizes = shapes, sorted(shapes)

    def add(self, size: int, shape: Shape) -> None:
        self.shapes[size] = shape
        insort(self.sizes, size)

    def meeting(self, capacity: int, share: float, high: int) -> int:
        """The size at which a line through two sizes meets the capacity: memory is nearly linear. They are `high`,
        which does not fit, and the one before it, or else the nearest that are known.

        share: of the memory that the allocator would have cached, the part that the card must have room for.
        """
        if len(self.sizes) == 1:
            return self.sizes[0]
        after = min(max(bisect_left(self.sizes, high), 1), len(self.sizes) - 1)
        left, right = self.sizes[after - 1], self.sizes[after]
        at_left, at_right = (
            shape.least + share * (shape.needed - shape.least) for shape in (self.shapes[left], self.shapes[right])
        )
        if at_right <= at_left:  # the peak lies in the optimizer, whose memory does not depend on the size
            return 4 * right if capacity >= at_right else left
        return left + int((right - left) * (capacity - at_left) / (at_right - at_left))

    def spread(self, capacity: int, high: int) -> int:
        """Between how many sizes the boundary must lie, if memory is linear."""
        return self.meeting(capacity, 0.0, high) - self.meeting(capacity, 1.0, high)

    def share(self, capacity: int, low: int) -> float:
        """That of `meeting`, of a card on which `low` is the largest."""
        shape = self.shapes[low]
        return min(1.0, max(0.0, (capacity - shape.least) / max(1, shape.needed - shape.least)))
