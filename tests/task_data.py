"""Small data in every form that is read, and the tasks that they are."""

import json
import os
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from meftbench.catalogue.task import Task

# Beside the repository unless the variable of `meftbench` says otherwise.
DATA = Path(os.environ.get("MEFTBENCH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
ROWS = [
    {"title": 'the "best" of all', "spam": 1},
    {"title": "NA", "spam": 0},
    {"title": "grüße, ihr alle", "spam": 0},
    {"title": "buy now", "spam": 1},
]


def a_task(folder, **facts):
    return Task(
        **{
            "name": "mail",
            "family": "own",
            "kind": "classification",
            "summary": "",
            "hub": None,
            "folder": str(folder),
            "texts": ("title",),
            "label": "spam",
            "labels": ("ham", "spam"),
            "scores": ("accuracy",),
            "licence": "",
        }
        | facts
    )


def a_choice_task(folder, **facts):
    return a_task(folder, **{"kind": "choices", "labels": None, "choices": ("options",), "template": "{title}"} | facts)


def write(folder, split, rows=ROWS, form="jsonl"):
    """`rows` as a split in a form: an ending, or `saved` (save_to_disk)."""
    folder.mkdir(parents=True, exist_ok=True)
    file, table = folder / f"{split}.{form}", datasets.Dataset.from_list(rows)
    match form:
        case "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            file.write_text(json.dumps(rows))
        case "csv":
            table.to_pandas().to_csv(file, index=False)
        case "tsv":
            file.write_text(
                "\n".join("\t".join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]) + "\n"
            )
        case "parquet":
            table.to_parquet(file)
        case "arrow":
            table.save_to_disk(folder / "written")
            next((folder / "written").glob("*.arrow")).rename(file)
            for left in (folder / "written").iterdir():
                left.unlink()
            (folder / "written").rmdir()
        case "saved":
            table.save_to_disk(folder / split)


def some_mail(folder, **splits):
    """A task's folder with both splits, some of them replaced."""
    for split in ("train", "validation"):
        write(folder, split, splits.get(split, ROWS))
    return a_task(folder)


def some_pixels(count=6, side=8, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, 3), dtype=np.uint8)


def some_images(folder, classes=("cats", "dogs"), splits=("train", "val")):
    """An image folder; image i of a split is in class i % 2, as PNG."""
    for split in splits:
        for i, pixels in enumerate(some_pixels()):
            place = folder / split / classes[i % len(classes)]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{i}.png")
    return a_task(folder, kind="images", texts=("image",), label="label", labels=None, sequence_length=None)


@cache
def a_tokenizer(file):
    return PreTrainedTokenizerFast(tokenizer_file=str(file))
