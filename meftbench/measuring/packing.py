"""Packed batches: the samples of a micro-batch end to end in one row, without padding, and the step that trains on it.

A packed row has the positions of each sample from 0 on, and a label that is left out at the first token of each, since
nothing before it in its sample predicts it. So the loss is a mean over the same tokens as that of a padded batch, and
attention, which is told where samples begin (backbones/packed.py), never crosses them.

Shape suffixes: T tokens of all samples, M micro-batches, S samples of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from meftbench.measuring.step import Step

# Arguments of a model's forward for a packed row, beside input_ids, position_ids and labels. The first four are those
# by which transformers tells attention where samples begin (FlashAttentionKwargs). The lengths as numbers are for
# attention of one sample at a time, so that it need not read a tensor, for which a device would have to be waited for.
LENGTHS = "packed_lengths"
STARTS = "cu_seq_lens"


def packed(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """One row of all samples, and the tokens of each: input_ids, position_ids and labels, all (1, T), int64.

    rows: input_ids and labels of each sample, without padding, as lists, arrays or tensors.
    """
    from transformers import DataCollatorWithFlattening

    lists = [{name: torch.as_tensor(row[name]).tolist() for name in ("input_ids", "labels")} for row in rows]
    row = DataCollatorWithFlattening(return_tensors="pt")(lists)
    return dict(row), tuple(len(sample["input_ids"]) for sample in lists)


def without_padding(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples of a padded batch, each without its padding. batch: input_ids, attention_mask and labels (B, L)."""
    kept = batch["attention_mask"].bool()
    return [
        {name: batch[name][sample][kept[sample]] for name in ("input_ids", "labels")} for sample in range(len(kept))
    ]


def starts_of(lengths: Sequence[int], samples: int) -> Tensor:
    """Where in its row each sample of a micro-batch begins, and where the last one ends: (M, S + 1), int32.

    lengths: tokens of all samples.  samples: of one micro-batch; it divides their number.
    """
    parts = [lengths[start : start + samples] for start in range(0, len(lengths), samples)]
    return torch.tensor([[0, *accumulate(part)] for part in parts], dtype=torch.int32)


def told(starts: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """The arguments of forward that tell attention where the samples of a row begin. starts: (S + 1)."""
    longest = max(lengths)
    return {
        f"{STARTS}_q": starts,
        f"{STARTS}_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        LENGTHS: tuple(lengths),
    }


@dataclass
class PackedStep(Step):
    """A step whose micro-batches are packed rows.

    batch: input_ids, position_ids and labels (1, T) of all samples, of which a micro-batch is a part; and where samples
        begin in their micro-batches (M, S + 1).
    lengths: tokens of each sample.
    """

    lengths: tuple[int, ...] = ()

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def _samples(self, start: int, stop: int) -> dict[str, Any]:
        before, after = sum(self.lengths[:start]), sum(self.lengths[:stop])
        row = {name: tensor[:, before:after] for name, tensor in self.batch.items() if name != STARTS}
        if stop - start == self.micro_batch_size:
            starts = self.batch[STARTS][start // self.micro_batch_size]
        else:
            (starts,) = starts_of(self.lengths[start:stop], stop - start).to(self.device)
        return row | told(starts, self.lengths[start:stop])


def packing_fault(step: PackedStep, rows: Iterable[tuple[int, Sequence[int]]]) -> str | None:
    """The fact that shows that a step did not run on packed rows; None: it did.

    rows: what attention read, each row with its tokens and the lengths of its samples (`backbones.packed.rows_read`).
    """
    read = list(rows)
    if not read:
        return "attention was not told where samples begin"
    whole = [step.lengths[at : at + step.micro_batch_size] for at in range(0, step.batch_size, step.micro_batch_size)]
    for tokens, lengths in read:
        if sum(lengths) != tokens:
            return f"a row of {tokens} tokens has samples of {sum(lengths)}: the rest is padding"
        if tuple(lengths) not in whole:
            return f"a row has {len(lengths)} samples, and a micro-batch {step.micro_batch_size}"
    for sample, (start, stop) in enumerate(pairwise(accumulate(step.lengths, initial=0))):
        positions, first = step.batch["position_ids"][0, start:stop], int(step.batch["labels"][0, start])
        if first != -100 or not torch.equal(positions, torch.arange(stop - start, device=positions.device)):
            return f"sample {sample} does not begin anew: its positions or its first label go on"
    return None
