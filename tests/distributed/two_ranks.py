"""Two ranks over gloo, forked from the test process, which has torch imported: each runs cells, tells what it saw."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import torch

from meftbench.measuring.build import build_step
from meftbench.measuring.groups import in_group
from meftbench.measuring.sharing import Rank
from meftbench.plan.cell import Cell
from meftbench.probes.memory_counted import CountedStep

RANKS = 2
SAMPLES = 4  # of a rank
STEPS = 3  # the first makes the optimizer's states; the others are alike

# Sizes that two ranks cannot share evenly: 9, 35 and 121 rows.
_BERT = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 35,
    "vocab_size": 121,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = _BERT | {"num_key_value_heads": 3, "num_attention_heads": 3, "head_dim": 12}
BERT, LLAMA, MINILM, SMOLLM2 = "bert-tiny@random", "llama-3.2-1b@random", "minilm", "smollm2"
MODELS = {BERT: _BERT | _NO_DROPOUT, LLAMA: _LLAMA, MINILM: _NO_DROPOUT, SMOLLM2: {}}


def a_cell(model: str, method: str, parallelism: str | None, precision: str = "fp64", **fields) -> Cell:
    """A cell of two ranks; `parallelism` None: of one process with the samples of both."""
    ranks = {"world_size": RANKS, "parallelism": parallelism} if parallelism else {}
    samples = SAMPLES * (1 if parallelism else RANKS)
    given = {"batch_size": samples, "micro_batch_size": samples, "sequence_length": 12, "precision": precision}
    return Cell.of(method, model=model, model_config_overrides=MODELS[model], **(given | ranks | fields))


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def gradients_of(step) -> dict[str, torch.Tensor]:
    """The whole gradient of each trained tensor, from one forward and backward pass."""
    step.forward_backward()
    return {name: whole(parameter.grad) for name, parameter in step.applied.trained().items()}


def gradient_error(number: int, cell: Cell, alone: Cell) -> float:
    """The largest difference from the gradients of one process, as a share of its largest gradient; rank 0 looks."""
    device = torch.device("cpu")
    found = gradients_of(build_step(cell, device, rank=Rank(number, cell.world_size, cell.parallelism)))
    if number:
        return 0.0
    expected = gradients_of(build_step(alone, device))
    assert list(expected) == list(found)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[name] - gradient).norm()) for name, gradient in expected.items()) / largest


def levels(observed) -> tuple[int, dict[str, int], int]:
    """What a counter saw of a step: bytes before it, the peak of each phase, and the highest."""
    return observed.baseline, observed.phase_peaks, observed.peak.total


def counted_by(number: int, cell: Cell):
    """The levels of each step that rank `number` counts."""
    step = build_step(cell, torch.device("cpu"), rank=Rank(number, cell.world_size, cell.parallelism))
    with CountedStep(step) as counted:
        return [levels(counted.run()) for _ in range(STEPS)]


def _run(number: int, folder: Path, cases) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # counted steps collect garbage, of which there is none in what was imported
    with in_group(Rank(number, RANKS, "ddp"), (folder / "meeting").as_uri(), torch.device("cpu")):
        seen = {
            case: (gradient_error(number, cell, alone), counted_by(number, counted))
            for case, (cell, alone, counted) in cases.items()
        }
    (folder / f"{number}.pickle").write_bytes(pickle.dumps(seen))
    os._exit(0)


def found_by_ranks(cases):
    """For each rank, by case: its gradient error, and the levels of its steps.

    cases: by name, a cell, the same in one process, and one whose steps are counted.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_run, args=(number, folder, cases), daemon=True) for number in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return [pickle.loads((folder / f"{number}.pickle").read_bytes()) for number in range(RANKS)]
