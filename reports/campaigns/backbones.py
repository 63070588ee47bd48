"""Activation memory of every backbone under every kind of method, one size each.

    python reports/campaigns/backbones.py reports/backbones

Every step is traced, not computed (meftbench.prediction.trace): the bytes are those the CPU step allocates, counted.
Writes table.csv and table.md, which is also printed. fp32, batch 8 at 512 tokens (images: 8 at their own length);
models that predict tokens with and without `+chunked_loss`, since their logits hide everything else. The first step is
traced: activation memory does not contain optimizer state.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.models import attention_of, head_of, image_tokens, known_config
from meftbench.prediction.trace import count_uncomputed
from meftbench.records.store import made

MODELS = (
    "bert-base",
    "roberta-base",
    "bart-base",
    "opt-125m",
    "opt-350m",
    "vit-base",
    "deit-small",
    "smollm2-135m",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "gemma-3-270m",
)
HEADS = {"bart-base": "seq2seq_lm"}  # its classifier looks at token values, which a trace has not
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {}),
    ("full+checkpoint", {}),
    ("lora", {}),
    ("lora+checkpoint", {}),
    ("parallel", {}),
    ("meft1", {}),
    ("meft1-exact", {"tiles": 16}),
    ("meft3-exact", {"tiles": 16}),
)


def a_cell(model: str, method: str, params: dict[str, Any], batch: int, length: int) -> Cell:
    config = known_config(model, {}) or {}
    name = f"{model}@random"
    return Cell.of(
        method,
        method_params=params,
        model=name,
        head=HEADS.get(model),
        attention_requested=attention_of("backbones", name, {}, None),
        batch_size=batch,
        sequence_length=image_tokens(config) or length,
    )


def counted(models: list[str], batch: int, length: int) -> pd.DataFrame:
    """One row a model, method and, where it predicts tokens, kind of loss."""
    rows = []
    for model in models:
        head = head_of(str((known_config(model, {}) or {})["model_type"]), HEADS.get(model))
        levers = ("", "+chunked_loss") if head.endswith("_lm") else ("",)
        for lever in levers:
            for method, params in METHODS:
                cell = a_cell(model, method + lever, params, batch, length)
                peak = count_uncomputed(cell, warmup=0).activation_peak
                label = cell.method_label.replace("+chunked_loss", "")
                rows.append((model, head + lever, label, cell.sequence_length, peak))
                print(f"{model} {cell.method_label}: {peak / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    return pd.DataFrame(rows, columns=["model", "loss", "method", "tokens", "activation_peak_bytes"])


def table(frame: pd.DataFrame) -> str:
    """Markdown: MiB, a row a model and loss, a column a method."""
    mebibytes = frame.assign(MiB=(frame.activation_peak_bytes / 2**20).round(1))
    wide = mebibytes.pivot_table(index=["model", "loss", "tokens"], columns="method", values="MiB", sort=False)
    rows = [["model", "loss", "tokens", *wide.columns], ["---"] * (3 + len(wide.columns))]
    rows += [
        [*map(str, key), *(f"{v:,.1f}" for v in values)] for key, values in zip(wide.index, wide.values, strict=True)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Trace, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    options = parser.parse_args(arguments)
    try:
        made(options.out)  # before the work
        frame = counted(list(options.models), options.batch_size, options.sequence_length)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    frame.to_csv(options.out / "table.csv", index=False)
    text = (
        f"# Activation memory in MiB (counted), batch {options.batch_size}, fp32\n\n"
        "One training step of each model with random weights, traced on a CPU. `+chunked_loss`: the loss is taken in\n"
        "chunks of tokens, so that the logits are never whole.\n\n" + table(frame)
    )
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
