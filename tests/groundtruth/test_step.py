"""A real training step of an A100 is predicted allocation by allocation: sizes, order, ends, and levels to the byte.

The traces 03 and 04 (data/README.md) are of one step each of the decoder of decoder.py, in float32 and under bfloat16's
autocast. Before the step its loop gave back the gradients of the step before; a step of meftbench gives them back at
its end. Levels are therefore counted from the first allocation on, where neither has gradients.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from real_traces import TRACES, as_pickled

from meftbench.asked import asked_cell
from meftbench.catalogue.profiles import find_profile
from meftbench.plan.factories import FOLDER
from meftbench.prediction.predict import Predicted, predict
from meftbench.snapshots.replay import replay
from meftbench.snapshots.state import state_before
from snapshots import checked, written

MiB = 2**20
LAYERS, PARAMETERS = 32, 291
WORKSPACE = 8_519_680  # of cuBLAS on an A100, bytes
PRECISIONS = {"03": "fp32", "04": "bf16-autocast"}


@dataclass(repr=False)
class Allocations:
    """Those of a step, in order.

    requested: bytes of each.  levels: bytes allocated in the step and not yet given back, after each.
    ends: how many allocations had been made when each was given back; None: it outlives the step.
    origins, phases: the operator and the phase of each, where they are known.
    """

    requested: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    _alive: dict[int, int] = field(default_factory=dict)  # numbers of those not given back, by key
    _level: int = 0

    def born(self, key: int, nbytes: int, origin: str = "", phase: str = "") -> None:
        self._alive[key] = len(self.requested)
        self._level += nbytes
        self.requested.append(nbytes)
        self.levels.append(self._level)
        self.ends.append(None)
        self.origins.append(origin)
        self.phases.append(phase)

    def ended(self, key: int) -> None:
        """Nothing happens to what was allocated before the step."""
        if key in self._alive:
            number = self._alive.pop(key)
            self._level -= self.requested[number]
            self.ends[number] = len(self.requested)

    def numbers(self, phase: str, origin: str) -> list[int]:
        """Positions of the allocations of an operator."""
        return [n for n in range(len(self.requested)) if (self.phases[n], self.origins[n]) == (phase, origin)]


@dataclass(repr=False)
class Both:
    """A recorded step, and the same predicted."""

    trace: Path
    precision: str
    predicted: Predicted
    real: Allocations
    ours: Allocations


@pytest.fixture(scope="module", params=PRECISIONS, ids=PRECISIONS.get)
def both(request):
    trace = next(path for path in TRACES if path.name[:2] == request.param)
    predicted = a_prediction(PRECISIONS[request.param])
    return Both(trace, PRECISIONS[request.param], predicted, recorded(trace), of_last_step(predicted))


def a_prediction(precision, **config):
    """Of the decoder as it was recorded, but for `config`."""
    shape = {"batch": "decoder:batch", "batch_size": 4, "sequence_length": 512, "precision": precision}
    cell = asked_cell("test", "decoder:model", "full", "a100-80gb", config, None, allow_code=True, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(Path(__file__).parent))
        return predict(cell, find_profile("a100-80gb"))


def recorded(trace):
    found = Allocations()
    for entry in as_pickled(trace)["device_traces"][0]:
        if entry["action"] == "alloc":
            found.born(entry["addr"], entry["size"])
        elif entry["action"] == "free_completed":
            found.ended(entry["addr"])
    return found


def of_last_step(predicted):
    """The step after the first, which made the optimizer's state and the workspaces."""
    found, phase = Allocations(), ""
    for event in predicted.events[predicted.step_from :]:
        if event.kind == "phase":
            phase = event.category
        elif event.kind == "alloc":
            found.born(event.key, event.nbytes, event.origin, phase)
        elif event.kind == "free":
            found.ended(event.key)
    return found


def test_every_allocation_is_predicted(both):
    """All 5,002 of the step in float32, and all 6,288 under autocast: their sizes, in the order of the trace."""
    assert {"fp32": 5002, "bf16-autocast": 6288}[both.precision] == len(both.real.requested)
    assert both.real.requested == both.ours.requested


def test_every_allocation_is_given_back_when_it_was(both):
    """Between the same two allocations, but for gradients, which the recorded loop gave back in its next step."""
    differing = [n for n, (real, ours) in enumerate(zip(both.real.ends, both.ours.ends, strict=True)) if real != ours]

    assert PARAMETERS == len(differing)
    assert {None} == {both.real.ends[number] for number in differing}
    gradients = Counter({26_214_400: 4 * LAYERS, 104_857_600: 3 * LAYERS, 10_240: 2 * LAYERS + 1, 102_400_000: 2})
    assert gradients == Counter(both.real.requested[number] for number in differing)


# MiB above the level before the first allocation.
PEAKS = {
    "fp32": {"forward": 27_640.76, "backward": 27_977.29, "optimizer": 26_070.02},
    "bf16-autocast": {"forward": 24_710.65, "backward": 25_041.73, "optimizer": 26_030.96},
}


def test_the_peaks_of_all_phases_are_those_recorded(both):
    """To the byte, as the level after every single allocation is."""
    peaks = {
        phase: max(level for level, of in zip(both.real.levels, both.ours.phases, strict=True) if of == phase)
        for phase in PEAKS[both.precision]
    }

    assert both.real.levels == both.ours.levels
    assert PEAKS[both.precision] == {phase: round(peak / MiB, 2) for phase, peak in peaks.items()}


def test_the_device_holds_as_many_bytes(both):
    """What is alive before the step (weights, the optimizer's state, angles, batch, workspaces) and the peak, both in
    whole blocks as torch counts them, are the device's own numbers."""
    snapshot = checked(as_pickled(both.trace))
    levels = replay(snapshot).after
    first = next(number for number, entry in enumerate(snapshot.trace) if entry.action == "alloc")
    step = both.predicted.replayed.steps[-1]

    assert (levels[first - 1].requested, levels[first - 1].allocated) == (
        step.baseline.requested,
        step.baseline.allocated,
    )
    assert {"fp32": 70_370_929_664, "bf16-autocast": 68_417_112_576}[both.precision] == step.peak.allocated
    assert max(level.allocated for level in levels[first:]) == step.peak.allocated


def test_reserved_memory_is_within_one_percent(both):
    """It depends on all that the process did before, of which only the last step was recorded."""
    real = replay(checked(as_pickled(both.trace))).peak("reserved")
    assert 1 == pytest.approx(both.predicted.replayed.reserved_peak / real, abs=0.01)


def test_cublas_has_two_workspaces(both):
    """They are in the device's memory before the step; predicted, the first step takes one in each direction, right
    behind the result of the first product."""
    before = state_before(checked(as_pickled(both.trace)))
    first_step = [event for event in both.predicted.events[: both.predicted.step_from] if event.kind == "alloc"]
    behind = [first_step[number - 1] for number, event in enumerate(first_step) if event.nbytes == WORKSPACE]

    assert 2 == sum(block.item.requested == WORKSPACE for block in before.live)
    assert WORKSPACE not in both.real.requested
    assert ["bmm.default", "bmm.default"] == [event.origin for event in behind]
    first_product = {"fp32": 20_971_520, "bf16-autocast": 10_485_760}[both.precision]  # queries of the first layer
    gradient = {"fp32": 102_400_000, "bf16-autocast": 51_200_000}[both.precision]  # of the head
    assert [first_product, gradient] == [event.nbytes for event in behind]


# Of the recordings from an empty device on: bytes of the first product, and in backward of the head's gradient.
BEHIND = {"00": [4_096_000, 20_480_000], "01": [2_048_000, 10_240_000], "02": [2_048_000]}


@pytest.mark.parametrize("trace", BEHIND)
def test_real_workspaces_stand_behind_the_first_products(trace):
    """Recordings of another decoder from an empty device on: forward's, and backward's where there is one (not in 02).

    This is the order in which the workspaces are predicted."""
    sizes = recorded(next(path for path in TRACES if path.name[:2] == trace)).requested
    assert BEHIND[trace] == [sizes[number - 1] for number, size in enumerate(sizes) if size == WORKSPACE]


def test_gradients_of_norms_are_summed_with_buffers(both):
    """2,048 rows of 2,560 in parts: 40 MiB of partial sums and 20 semaphores, behind each of the 65 results."""
    real, ours = both.real.requested, both.ours
    sums = [number for number in ours.numbers("backward", "sum.dim_IntList") if real[number] == 10_240]

    assert 2 * LAYERS + 1 == len(sums)
    for number in sums:
        assert [41_943_040, 80] == real[number + 1 : number + 3] == ours.requested[number + 1 : number + 3]
        # The semaphores are given back before the buffer is, and both before anything else is allocated.
        assert [number + 3] * 2 == both.real.ends[number + 1 : number + 3]


def test_gradients_that_meet_are_added_in_place(both):
    """Of all sums of gradients two a layer are new, in float32: where gradients meet that are views of what bmm
    returned, whose memory the view's base holds, too. Under autocast these are conversions to float32, and none is."""
    new = {"fp32": 2 * LAYERS, "bf16-autocast": 0}[both.precision]
    assert new == len(both.ours.numbers("backward", "add.Tensor"))


def test_gradients_are_put_into_zeros_without_a_copy(both):
    """Those of the greatest scores: 32 tensors of the size of all scores. That of the embedding: indices are sorted
    beside it, for which CUB takes a single byte."""
    real, zeros = both.real.requested, both.ours.numbers("backward", "new_zeros.default")
    scores = {"fp32": 134_217_728, "bf16-autocast": 67_108_864}[both.precision]

    assert [*[scores] * LAYERS, 102_400_000] == [real[number] for number in zeros]
    assert [*[16_384] * 5, 1] == real[zeros[-1] + 1 : zeros[-1] + 7]
    assert [*range(zeros[-1] + 1, zeros[-1] + 7)] == both.ours.numbers("backward", "index_put.default")
    assert [] == both.ours.numbers("backward", "scatter.src")


def test_validate_tells_that_nothing_differs(tmp_path, cli):
    """The command holds the prediction against the snapshot's file; both peaks are above the step's beginning."""
    trace = next(path for path in TRACES if path.name[:2] == "03")
    written(tmp_path, as_pickled(trace))
    shutil.copy(Path(__file__).parent / "decoder.py", tmp_path)
    shape = ["--batch", "decoder:batch", "--batch-size", "4", "--sequence-length", "512"]

    code, out, _ = cli("validate", "snapshot.pickle", "decoder:model", "full", *shape, "--allow-code", "--json")

    found = json.loads(out)
    assert 0 == code
    assert (5002, 5002, 5002) == (found["recorded"], found["predicted"], found["common"])
    assert (29_336_318_976, 29_336_318_976) == (found["recorded_above_bytes"], found["predicted_above_bytes"])


def test_layers_are_alike():
    """The recorded step allocates as often as a step of two layers and 30 times what a third layer adds."""
    two, three = (len(of_last_step(a_prediction("fp32", layers=layers)).requested) for layers in (2, 3))
    assert 5002 == two + 30 * (three - two)
