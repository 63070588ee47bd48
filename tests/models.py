"""Small real transformers models, and batches for them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones.build import build_model
from meftbench.plan.cell import Cell
from meftbench.step import Step, build_step

# Windows are collected at their edges; what is imported by now never becomes garbage.
gc.freeze()

MEFTS = ["meft1", "meft2", "meft3"]
EXACTS = ["meft1-exact", "meft2-exact", "meft3-exact"]
METHODS = ["full", "lora", "houlsby", "pfeiffer", "parallel", *MEFTS, *EXACTS]
FOUR_LAYERS = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def a_model(
    layers: int = 4, dtype: torch.dtype = torch.float64, backbone: str = "bert", dropout: float = 0.1
) -> nn.Module:
    """A small BERT or RoBERTa classifier with random weights, in training mode."""
    overrides = FOUR_LAYERS | {
        "num_hidden_layers": layers,
        "vocab_size": 120,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    name = {"bert": "bert-tiny@random", "roberta": "roberta-base@random"}[backbone]
    return build_model(name, overrides, dtype=dtype)


def a_batch(samples: int = 3, length: int = 12, padded: int = 4) -> dict[str, Tensor]:
    """Tokens and labels; the first sample ends in `padded` positions of padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(samples, length, dtype=torch.long)
    mask[0, length - padded :] = 0
    return {
        "input_ids": torch.randint(5, 120, (samples, length), generator=generator),
        "attention_mask": mask,
        "labels": torch.arange(samples) % 2,
    }


def a_cell(method: str = "full", **changes: Any) -> Cell:
    """A cell of a tiny model; "+lever" in the method's name switches levers on."""
    values: dict[str, Any] = {
        "model": "bert-tiny@random",
        "model_config_overrides": FOUR_LAYERS | {"vocab_size": 120, "attention_probs_dropout_prob": 0.0},
        "batch_size": 4,
        "sequence_length": 16,
    }
    return Cell.of(method, **(values | changes))


def a_step(method: str = "full", **changes: Any) -> Step:
    """The training step of `a_cell`, on the CPU."""
    return build_step(a_cell(method, **changes), torch.device("cpu"))


def gradients(model: nn.Module, batch: dict[str, Tensor], seed: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradient of every trained parameter; random numbers as from `seed`."""
    torch.manual_seed(seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch).loss
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def worst_relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 error over tensors; both must have the same names."""
    assert list(found) == list(expected)
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items() if e.norm() > 0)
