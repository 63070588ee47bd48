"""Train a transformers model with exact MEFT in a loop of your own, save the adapter, and load it again.

    python examples/train.py [MODEL]

MODEL: a name of `meftbench list models`, a hub id or a folder; without one a small BERT with random weights. The task
is a toy: whether a sequence of tokens begins with a large number.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import meftbench
from meftbench.backbones.build import build_model

METHOD = "meft1-exact"


def main(name: str = "bert-tiny@random") -> None:
    """Twenty steps; then what was trained goes to a folder and back."""
    model = meftbench.apply_method(build_model(name), METHOD, seed=0, adapter_size=16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{sum(map(torch.numel, trained)):,} of {total:,} parameters are trained")

    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    for step in range(20):
        input_ids = torch.randint(5, vocabulary, (8, 32), generator=generator)
        loss = model(input_ids=input_ids, labels=(input_ids[:, 0] > vocabulary // 2).long()).loss
        loss.backward()  # layers run again here, from their outputs
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        meftbench.save_adapter(model, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        fresh = meftbench.load_adapter(build_model(name), folder)
        print(f"the adapter has {size:,} bytes")
    model.eval(), fresh.eval()
    with torch.no_grad():
        same = torch.equal(model(input_ids=input_ids).logits, fresh(input_ids=input_ids).logits)
    print(f"loaded again, its logits are {'the same, bit for bit' if same else 'other ones'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
