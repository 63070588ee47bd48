"""Train with transformers.Trainer: a model that has a method applied is given to it as any other.

    python examples/trainer.py [MODEL]

Needs accelerate (`pip install 'meftbench[tasks]'`).
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments

import meftbench
from meftbench.backbones.build import build_model


class Toy(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sequences of tokens, and whether they begin with a large number."""

    def __init__(self, vocabulary: int) -> None:
        self.input_ids = torch.randint(5, vocabulary, (64, 32), generator=torch.Generator().manual_seed(0))
        self.labels = (self.input_ids[:, 0] > vocabulary // 2).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def main(name: str = "bert-tiny@random") -> None:
    """Two epochs, accumulating gradients over two batches; then the adapter is saved."""
    model = meftbench.apply_method(build_model(name), "meft3-exact", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=Toy(model.config.vocab_size))
        print(f"{trainer.train().global_step} steps")
        meftbench.save_adapter(model, f"{folder}/adapter")  # not trainer.save_model: it writes the whole model
    print("saved")


if __name__ == "__main__":
    main(*sys.argv[1:])
