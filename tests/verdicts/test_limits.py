"""Predictions as limits of memory: enough, and not much more. Tried on a CPU, where the counter keeps to the limit."""

from __future__ import annotations

import pytest

from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.prediction.trace import count_uncomputed
from meftbench.runner import process
from meftbench.verdicts.limits import UNUSED, Limited, limited

PROTOCOL = Protocol(warmup=1, steps=1, passes=("memory",))
SHAPES = {
    "bert": {"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16},
    "smollm2": {
        "model": "smollm2-135m@random",
        "model_config_overrides": {"num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 99},
        "batch_size": 2,
        "sequence_length": 16,
    },
}


@pytest.mark.parametrize(
    ("method", "model"), [("full", "smollm2"), ("lora+checkpoint", "bert"), ("meft1-exact", "smollm2")]
)
def test_a_step_runs_within_its_predicted_peak_and_not_within_a_block_less(model, method, monkeypatch, worker_command):
    """The trace's peak is the step's, so nothing stays unused; 512 bytes less, and the cell is out of memory."""
    monkeypatch.setattr(process, "WORKER", worker_command)
    cell = Cell.of(method, **SHAPES[model])
    peak = max(count_uncomputed(cell, warmup=warmup).peak.total for warmup in (0, 1))
    peak += 1024 * ("exact" in method)  # two vectors of its calibration, which no trace has

    (enough,) = limited([(cell, peak)], PROTOCOL)
    (too_little,) = limited([(cell, peak - 512)], PROTOCOL)

    assert ("ok", 0.0, True) == (enough.status, enough.unused, enough.held)
    assert ("oom", None, False) == (too_little.status, too_little.unused, too_little.held)


def test_a_limit_that_is_too_generous_is_not_held():
    """Of which more than 3 % stay unused."""
    assert Limited("a", 1000, "ok", 970).held
    assert not Limited("a", 1000, "ok", 969).held
    assert pytest.approx(UNUSED) == Limited("a", 1000, "ok", 970).unused
