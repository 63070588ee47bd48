"""A model and a batch of a published measurement that no head here is: BERT with masked language modelling.

Named in reports/published/figures.yaml as `masked_lm:bert_base` and `masked_lm:batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel


def bert_base() -> PreTrainedModel:
    """BERT-base, its embeddings shared with the output."""
    return BertForMaskedLM(BertConfig())


def batch(batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    """Tokens and labels (B, L): every position has one."""
    tokens = torch.randint(5, 30_000, (batch_size, sequence_length))
    return {"input_ids": tokens, "labels": tokens}
