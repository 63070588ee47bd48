"""Training steps of the classifier stay within their memory budgets, counted without a GPU."""

import pytest
import torch
from gated.model import batch, build


@pytest.mark.memory_budget("5.5MiB", activation_peak="3.25MiB")
def test_a_training_step(memory_budget):
    """Parameters, gradients and AdamW's state included; and what forward and backward add to that."""
    memory_budget(build(), batch(batch_size=8, sequence_length=32))


def test_nothing_is_kept_from_one_step_to_the_next(memory_budget):
    """With plain SGD nothing is held between two steps but the weights and the batch."""
    model = build()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bounds = {"drift_bytes_per_step": 0, "baseline_allocated": weights + 16 * 1024}
    memory_budget(model, batch(8, 32), optimizer=optimizer, **bounds)


@pytest.mark.parametrize("sequence_length", [64, 128])
def test_long_texts(memory_budget, sequence_length):
    """Their budgets are in memory_budgets.yaml, exact to the byte."""
    memory_budget(build(), batch(2, sequence_length))
