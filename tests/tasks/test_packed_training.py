"""Trainings whose batches are packed: the losses, tokens and scores of padded ones, without their padding."""

from __future__ import annotations

import pytest
import torch

from meftbench.probes.levers import check_levers
from tests.trainings import TINY_OPT, a_choice, a_training, losses, prepared, trained

DECODER = {"model": "opt-125m@random", "model_config_overrides": TINY_OPT}


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_a_packed_training_is_the_padded_one(tmp_path, micro_batch_size):
    """Step by step: losses are means over the tokens of answers in both, and evaluation reads padded rows in both."""
    task = a_choice(tmp_path / "task")
    fields = DECODER | {"micro_batch_size": micro_batch_size}

    padded, _ = trained(a_training(task, **fields))
    packed, _ = trained(a_training(task, **fields, packing=True))

    assert losses(padded) == pytest.approx(losses(packed), rel=2e-5)
    for number in ("training_tokens", "score", "score_untrained"):
        assert padded[number] == packed[number], number


def test_its_memory_is_measured_on_the_tokens_of_the_first_rows(tmp_path):
    """In a row that has no other tokens; a padded cell fills each up to its sequence length."""
    rows = [{"question": "which is it? " * (i + 1), "options": ["red", "blue"], "answer": 0} for i in range(4)]
    cell = a_training(a_choice(tmp_path / "task", rows=rows), "lora+checkpoint", **DECODER, packing=True)
    quality = prepared(cell)

    step = quality.step()
    step.run()

    assert [len(row["input_ids"]) for row in quality.encoded.train[:4]] == [*step.lengths] == sorted({*step.lengths})
    assert sum(step.lengths) == step.tokens == step.batch["input_ids"].numel() < 4 * 16
    assert torch.equal(torch.cat([torch.arange(length) for length in step.lengths]), step.batch["position_ids"][0])
    check_levers(step, cell)
