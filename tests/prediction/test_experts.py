"""Predictions of mixtures of experts: in each precision, as each device runs them, or one line."""

from __future__ import annotations

import pytest

from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.prediction.predict import predict
from tests.models import a_cell_of

A100 = find_profile("a100-80gb")
# A layer's experts have 4 · 3 · 64 · 256 weights, for 16 tokens with two of them.
SHAPE = {"batch_size": 1, "sequence_length": 16}
WIDE = {"hidden_size": 64, "moe_intermediate_size": 256, "vocab_size": 120, "num_hidden_layers": 2}


def a_mixture(method="lora", **changes):
    config = a_cell_of("qwen3_moe", method).model_config_overrides | WIDE | changes.pop("config", {})
    return a_cell_of("qwen3_moe", method, model_config_overrides=config, **(SHAPE | changes))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16-autocast"])
def test_every_precision_is_predicted(precision):
    """torch itself knows the shape of the product without values in bfloat16 only."""
    predicted = predict(a_mixture(precision=precision), A100)

    assert predicted.replayed.oom is None
    assert predicted.peak > 2 * 4 * 3 * 64 * 256 * (2 if precision == "bf16" else 4)


def test_before_compute_capability_8_frozen_experts_have_gradients_for_a_moment():
    """transformers' operator makes the gradients of both weights of a layer, whether they are trained or not."""
    older = A100.model_copy(update={"compute_capability": "7.5"})
    largest = 4 * 2 * 256 * 64 * 4  # of the larger weight, in float32

    found, expected = predict(a_mixture(), older).peak, predict(a_mixture(), A100).peak

    assert largest / 2 < found - expected < 2 * largest


def test_where_memory_depends_on_the_routing_it_is_not_predicted():
    """In transformers 4, and where each expert runs by itself."""
    with pytest.raises(UserError, match=r"--for-versions: .* what they are given; leave transformers out"):
        predict(a_mixture(), A100, versions=Versions.parse("transformers=4.57"))
    with pytest.raises(UserError, match="looks at values, which a trace has not; leave _experts_implementation out"):
        predict(a_mixture(config={"_experts_implementation": "eager"}), A100)
