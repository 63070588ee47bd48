"""What fits: the boundary found."""

from __future__ import annotations

import pytest

from builders import a_cell
from meftbench.catalogue.profiles import find_profile
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.largest import Shapes, largest
from meftbench.prediction.predict import predict

PROFILE = find_profile("rtx4090")
ENDLESS = AllocatorSettings()


class AShape:
    def __init__(self, needed):
        self.needed = self.least = needed

    def fits(self, capacity):
        return self.needed <= capacity


@pytest.mark.parametrize("needed", [lambda n: 10 + 3 * n, lambda n: 10 + n * n, lambda n: 40 + 3 * n + n // 7 * 9])
def test_the_largest_fits_and_one_more_does_not(needed):
    """Affine, quadratic and with jumps; each is found from few looks, those on both sides of each boundary among them.

    Nothing fits 10 bytes; the last has room for the limit.
    """
    looked = set()

    def shape(size):
        looked.add(size)
        return AShape(needed(size))

    capacities = (10, 100, 1000, 10**9)
    found = largest(shape, capacities, 3000)

    assert found == [max((n for n in range(1, 3001) if needed(n) <= c), default=0) for c in capacities]
    assert looked >= {n for size in found for n in (size, size + 1) if 1 <= n <= 3000}
    assert 30 >= len(looked)


def test_a_boundary_is_where_the_prediction_of_two_steps_says():
    """With the capacity of the card the largest batch goes through, and the next does not."""
    cell = a_cell(model="bert-tiny@random", method="lora", sequence_length=64, precision="bf16")
    capacity = 50 * 2**20
    (found,) = largest(Shapes(cell, PROFILE, ENDLESS).along("batch_size", 64), [capacity], 64)

    def oom(batch):
        sizes = {"batch_size": batch, "micro_batch_size": batch}
        card = AllocatorSettings(capacity=capacity)
        return predict(cell.model_copy(update=sizes), PROFILE, warmup=1, settings=card).replayed.oom

    assert found > 1
    assert oom(found) is None
    assert oom(found + 1) is not None
