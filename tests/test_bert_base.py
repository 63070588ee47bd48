"""Number 3 of the first issue: activation memory at BERT-base, 8 × 512, fp32, attention dropout 0, counted."""

from __future__ import annotations

import pytest
import torch

from meftbench.plan.cell import Cell
from meftbench.probes.memory_counted import CountedStep
from meftbench.step import build_step

STREAM = 8 * 512 * 768 * 4  # batch × tokens × hidden × 4 bytes


def streams(method):
    cell = Cell.of(
        method,
        model="bert-base@random",
        model_config_overrides={"attention_probs_dropout_prob": 0.0},
        batch_size=8,
        sequence_length=512,
    )
    with CountedStep(build_step(cell, torch.device("cpu"))) as counted:
        return counted.run().activation_peak / STREAM


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_meft_holds_an_eighth_of_full_and_three_quarters_of_lora_with_checkpointing():
    """meft1 ≤ 12.5 % of full and ≤ 75 % of lora+checkpoint. `meftbench run bert-base-streams` prints all methods."""
    meft1 = streams("meft1")

    assert meft1 <= 0.75 * streams("lora+checkpoint")
    assert meft1 <= 0.125 * streams("full")
