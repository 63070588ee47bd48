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
STEPS = 4  # the first makes the optimizer's states, the second DDP's last buckets

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
MODELS = {"bert-tiny@random": _BERT | _NO_DROPOUT, "llama-3.2-1b@random": _LLAMA}


def a_cell(model: str, method: str, parallelism: str | None, **fields) -> Cell:
    """A cell of two ranks in float64; `parallelism` None: of one process with the samples of both."""
    ranks = {"world_size": RANKS, "parallelism": parallelism} if parallelism else {}
    given = {"batch_size": SAMPLES * (1 if parallelism else RANKS), "sequence_length": 12, "precision": "fp64"}
    overrides = {"model_config_overrides": MODELS[model]} if model in MODELS else {}
    return Cell.of(method, model=model, **(given | overrides | ranks | fields))


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def gradient_error(step, alone) -> float:
    """The largest difference from the gradients of one process, as a share of its largest gradient."""
    alone.forward_backward()
    step.forward_backward()
    expected = {name: parameter.grad for name, parameter in alone.applied.trained().items()}
    found = {name: whole(parameter.grad) for name, parameter in step.applied.trained().items()}
    step.optimizer.zero_grad()
    assert list(expected) == list(found)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[name] - gradient).norm()) for name, gradient in expected.items()) / largest


def seen_by(number: int, cell: Cell, alone: Cell):
    """What rank `number` finds of a cell: its gradient error, and what the counter saw of each step."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    error = gradient_error(
        build_step(cell, device, rank=Rank(number, cell.world_size, cell.parallelism)), build_step(alone, device)
    )
    step = build_step(cell, device, rank=Rank(number, cell.world_size, cell.parallelism))
    with CountedStep(step) as counted:
        observed = [counted.run() for _ in range(STEPS)]
    return error, [(each.baseline, each.phase_peaks, each.peak.total) for each in observed], observed[-1].peak.breakdown


def _run(number: int, folder: Path, cases) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # counted steps collect garbage, of which there is none in what was imported
    with in_group(Rank(number, RANKS, "ddp"), (folder / "meeting").as_uri(), torch.device("cpu")):
        seen = {case: seen_by(number, *cells) for case, cells in cases.items()}
    (folder / f"{number}.pickle").write_bytes(pickle.dumps(seen))
    os._exit(0)


def found_by_ranks(cases):
    """For each rank, by case: what `seen_by` gives. cases: by name, a cell, and the same in one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_run, args=(number, folder, cases), daemon=True) for number in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return [pickle.loads((folder / f"{number}.pickle").read_bytes()) for number in range(RANKS)]
