"""Comparing at equal trained parameters: the closed formulas against models with the methods applied."""

from __future__ import annotations

import pytest

from meftbench.backbones.build import build_model
from meftbench.methods import prepare
from meftbench.plan.equal_parameters import ADAPTERS_A_LAYER, matching_rank
from meftbench.plan.suite import load_suite
from tests.models import TINY, a_model


def trained(model, method, settings, new_head=False):
    """Trained parameters of the method, without those of a head that every method trains."""
    parameters = prepare(model, method, settings, seed=1).trained()
    return sum(p.numel() for name, p in parameters.items() if new_head or "classif" not in name)


@pytest.mark.parametrize("method", ADAPTERS_A_LAYER)
@pytest.mark.parametrize("family", TINY)
def test_lora_of_the_matching_rank_trains_as_many_parameters(family, method):
    """Within 2 %, in every family: grouped queries, cross-attention, heads wider than the stream."""
    config = a_model(2, backbone=family).config.to_dict()
    rank = matching_rank(config, method, adapter_size=128)

    adapters = trained(a_model(2, backbone=family), method, {"adapter_size": 128})
    lora = trained(a_model(2, backbone=family), "lora", {"rank": rank})

    assert lora == pytest.approx(adapters, rel=0.02)


@pytest.mark.parametrize("name", ["minilm", "smoke"])
def test_the_demos_compare_at_equal_parameters_and_run_what_is_recommended(name):
    """Checkpointed LoRA of the matching rank beside exact reversal in tiles, at every shape."""
    cells = load_suite(name).cells
    exact = {(c.batch_size, c.sequence_length): c for c in cells if c.method == "meft1-exact"}
    lora = {(c.batch_size, c.sequence_length): c for c in cells if c.method == "lora" and "rank" in c.method_params}

    assert 4 == len(exact)
    assert exact.keys() == lora.keys()
    assert all(c.method_params["tiles"] >= 4 for c in cells if c.method.endswith("-exact"))
    assert all("checkpoint" in c.levers.names() for c in lora.values())
    one, other = next(iter(exact.values())), next(iter(lora.values()))
    counts = [
        trained(build_model(f"{c.model.removesuffix('@random')}@random", c.model_config_overrides), c.method,
                c.method_params, new_head=True)
        for c in (one, other)
    ]  # fmt: skip
    assert counts[0] == pytest.approx(counts[1], rel=0.02)


def test_the_list_of_models_names_the_rank(capsys):
    """Where somebody who writes a suite looks."""
    from meftbench.cli.listing import models

    assert 59 == models()["minilm"]["matching_rank"]
    assert "lora of rank 76 trains as much as meft" in models()["smollm2-135m"]["summary"]
