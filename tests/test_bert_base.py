"""Number 3 of the first issue: activation memory at BERT-base, 8 × 512, fp32, attention dropout 0.

Traced: tests/prediction/test_trace.py holds a trace against the computed step, byte for byte.
"""

from __future__ import annotations

from meftbench.plan.cell import Cell
from meftbench.prediction.trace import count_uncomputed

STREAM = 8 * 512 * 768 * 4  # batch × tokens × hidden × 4 bytes


def streams(method):
    cell = Cell.of(
        method,
        model="bert-base@random",
        model_config_overrides={"attention_probs_dropout_prob": 0.0},
        batch_size=8,
        sequence_length=512,
    )
    return count_uncomputed(cell, warmup=0).activation_peak / STREAM


def test_meft_holds_an_eighth_of_full_and_three_quarters_of_lora_with_checkpointing():
    """meft1 ≤ 12.5 % of full and ≤ 75 % of lora+checkpoint. `meftbench run bert-base-streams` prints all methods."""
    meft1 = streams("meft1")

    assert meft1 <= 0.75 * streams("lora+checkpoint")
    assert meft1 <= 0.125 * streams("full")
