"""The published arithmetic breaks down on deep pre-norm models: that is a result, with its numbers and a sentence."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

from builders import a_run
from meftbench.errors import CellFailure
from meftbench.measuring.measurers import measure_cell
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.probes.levers import check_levers
from meftbench.records.record import Metric
from meftbench.report.columns import error
from meftbench.report.render.terminal import print_summary
from tests.models import TINY, a_step

NAME, SMALL, _ = TINY["llama"]
# A factor this small: the streams of 24 layers leave float32 on the way back.
DEEP = {"model": f"{NAME}@random", "model_config_overrides": SMALL | {"num_hidden_layers": 24}, "head": "causal_lm"}


def a_deep_cell(method, **params):
    return Cell.of(method, method_params=params, batch_size=2, sequence_length=16, **DEEP)


@pytest.fixture(scope="module")
def collapsed():
    """All passes of a cell whose recomputed streams are not finite."""
    cell = a_deep_cell("meft3", **{"lambda": 0.001, "beta": 0.001})
    return measure_cell(cell, Protocol(warmup=1, steps=2)).metrics


def test_a_collapse_is_measured_to_its_end(collapsed):
    """Every pass has its numbers; errors are as they are, and a sentence says what broke down."""
    assert not math.isfinite(collapsed["reconstruction_rel_max"].value)
    assert not collapsed["gradient_rel_max"].value <= 1
    assert "recomputing activations in floating point broke down" in collapsed["collapse"].value
    assert collapsed["activation_peak_bytes"].value > 0
    assert math.isfinite(collapsed["starting_loss"].value)


def test_the_record_is_valid_json(collapsed):
    """Infinity and NaN are words in it, and come back as numbers."""
    for name, metric in collapsed.items():
        line = json.dumps(metric.to_json(name), allow_nan=False)
        value = Metric.from_json(json.loads(line)).value
        assert value == metric.value or (isinstance(value, float) and math.isnan(value)) or isinstance(value, list)


def test_exact_reversal_of_the_same_model_has_no_collapse():
    """The same depth and equations in fixed point: no sentence, no error."""
    found = measure_cell(a_deep_cell("meft3-exact"), Protocol(warmup=1, steps=2)).metrics

    assert "collapse" not in found
    assert 0 == found["range_widenings"].value
    assert 0 == found["reconstruction_rel_max"].value
    assert found["gradient_rel_max"].value < 1e-3


def test_a_dead_tensor_is_still_an_error():
    """Reference autograd has no gradient for it either, wherever the weights stand: something is not connected."""
    step = a_step("meft1")
    step.run()
    next(p for n, p in step.applied.trained().items() if n.endswith("down.weight")).register_hook(torch.zeros_like)

    from tests.models import a_cell

    with pytest.raises(CellFailure, match="is all zero"):
        check_levers(step, a_cell("meft1"))


def test_the_terminal_says_it(collapsed, tmp_path):
    """∞ or NaN in the table, and the sentence below it."""
    from builders import a_record

    record = a_record(method="meft3", metrics=dict(collapsed))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(a_run(tmp_path, record), console)
    console.file.close()
    text = console.export_text()

    assert "∞" in text or "NaN" in text
    assert "broke down" in text


@pytest.mark.parametrize(("value", "shown"), [(math.inf, "∞"), (math.nan, "NaN"), (-math.inf, "-∞"), (0.0, "0")])
def test_what_is_not_finite_is_shown_as_such(value, shown):
    """Never a blank."""
    assert shown == error(value)


def test_weights_that_training_destroyed_are_not_what_is_probed(collapsed):
    """The memory pass trains on such gradients; the starting point was measured on sane weights all the same."""
    assert torch.isfinite(torch.tensor(collapsed["loss_abs_diff"].value))
