"""Makes one batch of examples of different lengths.

Shape suffixes: B samples, C choices, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = dict[str, Any]
IGNORED = -100  # a label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class TextCollate:
    """Pads on the right to the longest of the batch, or to `pad_to` tokens.

    Rows with one sequence give input_ids, attention_mask and whatever else the tokenizer returns (B, L), and labels
    (B), or (B, L) with -100 at tokens that the loss leaves out. Rows with choices give the same sequences (B, C, L),
    labels or answer_index (B), and choice_mask (B, C): False where a row has fewer than C choices and its first choice
    fills the place.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Row], *, pad_to: int | None = None) -> dict[str, Tensor]:
        if not isinstance(rows[0]["input_ids"], list):
            return self._padded(rows, pad_to)
        C = max(len(row["input_ids"]) for row in rows)
        present = [[choice < len(row["input_ids"]) for choice in range(C)] for row in rows]
        flat = [
            {name: value[choice if is_present else 0] for name, value in row.items() if isinstance(value, list)}
            for row, row_present in zip(rows, present, strict=True)
            for choice, is_present in enumerate(row_present)
        ]
        batch = {name: t.view(len(rows), C, -1) for name, t in self._padded(flat, pad_to).items()}
        number_names = [name for name, value in rows[0].items() if not isinstance(value, list)]
        return batch | {name: _numbers(rows, name) for name in number_names} | {"choice_mask": torch.tensor(present)}

    def _padded(self, rows: Sequence[Row], pad_to: int | None) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        L = max(lengths) if pad_to is None else pad_to
        assert max(lengths) <= L, f"an example has {max(lengths)} tokens, to be padded to {L}"
        batch = {}
        for name, value in rows[0].items():
            if not isinstance(value, np.ndarray):
                batch[name] = _numbers(rows, name)
                continue
            filler = {"input_ids": self.pad_id, "labels": IGNORED}.get(name, 0)
            padded = np.full((len(rows), L), filler, dtype=np.int64)
            for padded_row, row in zip(padded, rows, strict=True):
                padded_row[: len(row[name])] = row[name]
            batch[name] = torch.from_numpy(padded)
        batch["attention_mask"] = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
        return batch


def collate_images(rows: Sequence[Row], *, pad_to: int | None = None) -> dict[str, Tensor]:
    """pixel_values (B, channels, H, W) and labels (B); images have one size, so nothing is padded."""
    pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in rows]))
    return {"pixel_values": pixels, "labels": _numbers(rows, "labels")}


def _numbers(rows: Sequence[Row], name: str) -> Tensor:
    """One number of each row (B): float32 where the numbers are floats (regression), else int64."""
    values = [row[name] for row in rows]
    return torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int64)
