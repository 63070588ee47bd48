"""The level through a step, in few points."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import a_cell
from meftbench.catalogue.profiles import find_profile
from meftbench.measuring.build import build_step
from meftbench.prediction.predict import predict
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.level_history import MOST, LevelHistory

PHASES = ("forward", "backward", "optimizer")


@given(st.lists(st.tuples(st.integers(1, 10**9), st.sampled_from(PHASES)), max_size=700))
def test_few_points_hold_the_peak_and_the_order(levels):
    """However many allocations and changes of phase there are."""
    history = LevelHistory()
    for total, phase in levels:
        history.allocated(total, phase, {"activations": total, "inputs": 0})

    points = history.points()

    assert len(points) <= MOST
    sizes = [point["bytes"]["activations"] for point in points]
    assert max(sizes, default=0) == max((total for total, _ in levels), default=0)
    rest = iter(levels)
    assert all((size, point["phase"]) in rest for size, point in zip(sizes, points, strict=True))


def test_a_few_allocations_are_all_kept():
    """A point for each."""
    history = LevelHistory()
    for total in (3, 1, 2):
        history.allocated(total, "forward", {"activations": total})

    assert [3, 1, 2] == [point["bytes"]["activations"] for point in history.points()]


def test_counted_and_predicted_steps_have_one_that_reaches_the_peak():
    """Through forward, backward and the optimizer's step."""
    cell = a_cell(model="bert-tiny@random", method="lora+checkpoint", sequence_length=32)
    predicted = predict(cell, find_profile("rtx4090")).measured[0]
    metrics = count_memory(build_step(cell, torch.device("cpu")), 1, 2)

    counted = metrics["timeline"].value
    for points, peak in ((counted, metrics["peak_allocated_bytes"].value), (predicted.timeline, predicted.peak.total)):
        assert peak == max(sum(point["bytes"].values()) for point in points)
        assert ["forward", "backward", "optimizer"] == list(dict.fromkeys(point["phase"] for point in points))[:3]
