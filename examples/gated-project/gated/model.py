"""A small text classifier: an encoder of transformers, with a pooling and a head of the project's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

VOCABULARY = 1000


class Classifier(nn.Module):
    """Classes of texts, from the mean of the hidden states."""

    def __init__(self, layers: int, classes: int) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": layers}
        self.encoder = BertModel(BertConfig(vocab_size=VOCABULARY, **sizes), add_pooling_layer=False)
        self.head = nn.Linear(64, classes)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, and the logits (B, classes) of input_ids (B, L) with labels (B)."""
        hidden = self.encoder(input_ids).last_hidden_state
        logits = self.head(hidden.mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def build(layers: int = 2) -> Classifier:
    """The model, untrained. Suites name it `gated.model:build`."""
    return Classifier(layers, classes=4)


def batch(batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    """Random texts of one length, with their classes. Suites name it `gated.model:batch`."""
    texts = torch.randint(VOCABULARY, (batch_size, sequence_length))
    return {"input_ids": texts, "labels": texts[:, 0] % 4}
