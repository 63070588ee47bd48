"""What LoRA-FA saves beside LoRA, and why it saved almost nothing where it was published last.

    python reports/campaigns/lora_fa.py reports/lora-fa

LoRA's first factor A reads x, the input of the projection, and x is kept for the gradient of A. LoRA-FA freezes A.
Steps are predicted for a GPU (meftbench.prediction) of three kinds: LoRA; LoRA-FA; and peft's `create_lorafa_optimizer`
after peft's `disable_adapter` was entered once, which lets A require a gradient again though the optimizer never
updates it.
Writes table.csv and table.md, which is also printed.

The published figures are those of peft's own comparison of methods (huggingface/peft, method_comparison/MetaMathQA/
results, Apache-2.0): Llama-3.2-3B in bfloat16, rank 32 on queries and values, batch 4 of at most 768 tokens, one L40S.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from meftbench.catalogue.profiles import Profile, find_profile
from meftbench.errors import UserError
from meftbench.methods import Applied
from meftbench.plan.cell import Cell
from meftbench.prediction.predict import predict
from meftbench.prediction.trace import uncomputed_model
from meftbench.prediction.tracer import Tracer
from meftbench.records.store import made

GB = 10**9
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("lora", "lora-fa", "peft's, after disable_adapter")
# Cells of the table: model, precision, projections that are adapted (None: queries and values), batch and tokens.
CELLS: tuple[tuple[str, str, list[str] | None, int, int], ...] = (
    ("minilm", "fp32", None, 32, 256),
    ("minilm", "bf16", None, 32, 256),
    ("smollm2-135m", "fp32", None, 4, 2048),
    ("smollm2-135m", "bf16", None, 4, 2048),
    ("llama-3.2-1b", "bf16", None, 4, 2048),
    ("llama-3.2-1b", "bf16", LINEAR, 4, 2048),
)
LEVERS = ("", "+chunked_loss", "+checkpoint", "+checkpoint+chunked_loss")
PUBLISHED_SETTINGS: dict[str, Any] = {"rank": 32, "alpha": 64.0}
# Date of the run, version of peft, bytes that torch had reserved at most: of LoRA, of LoRA-FA.
PUBLISHED = (
    ("2025-06-19", "0.15.2.dev0", 22_273_851_392, 20_187_185_152),
    ("2026-01-10", "0.18.1.dev0", 22_286_434_304, 20_206_059_520),
    ("2026-07-15", "0.19.2.dev0", 22_292_725_760, 22_240_296_960),
)


def as_peft_left_it(cell: Cell) -> Applied:
    """The cell's LoRA after peft's function for LoRA-FA, and after the adapter was switched off and on again once."""
    from peft.optimizers import create_lorafa_optimizer

    applied = uncomputed_model(cell)
    settings = cell.settings()
    create_lorafa_optimizer(applied.model, r=settings.rank, lora_alpha=settings.alpha, lr=1e-4)
    with applied.model.disable_adapter():
        pass
    return applied


def predicted(cell: Cell, kind: str, profile: Profile) -> dict[str, int]:
    """Bytes that are kept for the backward pass, of activations at their peak, and reserved at most."""
    made = as_peft_left_it if kind == KINDS[2] else uncomputed_model
    metrics = predict(cell, profile, tracer=Tracer(profile, made=made)).metrics()
    return {
        short: int(metrics[name].value)  # type: ignore[arg-type]
        for short, name in (
            ("kept", "saved_bytes"),
            ("activations", "activation_peak_bytes"),
            ("reserved", "peak_reserved_bytes"),
        )
    }


def a_cell(kind: str, levers: str, model: str, **fields: Any) -> Cell:
    return Cell.of(("lora-fa" if kind == "lora-fa" else "lora") + levers, model=f"{model}@random", **fields)


def predicted_table(cells: Any, profile: Profile) -> pd.DataFrame:
    """One row for each cell, levers and kind."""
    rows = []
    for model, precision, targets, batch, tokens in cells:
        params = {} if targets is None else {"targets": targets}
        for levers in LEVERS:
            if model == "minilm" and "chunked_loss" in levers:
                continue  # it predicts no tokens
            for kind in KINDS:
                shape = {"batch_size": batch, "sequence_length": tokens, "precision": precision}
                cell = a_cell(kind, levers, model, method_params=params, **shape)
                adapted = "queries, values" if targets is None else "all linear layers"
                sizes = predicted(cell, kind, profile)
                rows.append((model, precision, adapted, batch, tokens, levers or "plain", kind, *sizes.values()))
                print(f"{cell.label} ({kind}): {sizes['activations'] / GB:.2f} GB", file=sys.stderr, flush=True)
    names = ["model", "precision", "adapted", "batch", "tokens", "levers", "kind", "kept", "activations", "reserved"]
    return pd.DataFrame(rows, columns=names)


def published_table(model: str, batch: int, tokens: int) -> str:
    """Markdown: what was reserved at most, published and predicted, and how much less LoRA-FA takes."""
    rows = [[f"{date}, peft {version}", lora, frozen] for date, version, lora, frozen in PUBLISHED]
    profile = find_profile("l40s")
    lora, frozen, thawed = (
        predicted(
            a_cell(
                kind,
                "",
                model,
                method_params=PUBLISHED_SETTINGS,
                batch_size=batch,
                sequence_length=tokens,
                precision="bf16",
            ),
            kind,
            profile,
        )["reserved"]
        for kind in KINDS
    )
    rows += [["predicted, A frozen", lora, frozen], ["predicted, after disable_adapter", lora, thawed]]
    lines = ["| reserved at most, GB | LoRA | LoRA-FA | less |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {a / GB:.2f} | {b / GB:.2f} | {1 - b / a:.1%} |" for name, a, b in rows]
    return "\n".join(lines) + "\n"


def table(frame: pd.DataFrame) -> str:
    """Markdown: activations at their peak of each kind, and how much less than LoRA they are."""
    keys = ["model", "precision", "adapted", "batch", "tokens", "levers"]
    lines = ["| model | precision | adapted | shape | levers | LoRA, GB | LoRA-FA, GB | less | peft's, after it, GB |"]
    lines.append("| --- " * 9 + "|")
    for (model, precision, adapted, batch, tokens, levers), rows in frame.groupby(keys, sort=False):
        lora, frozen, thawed = (rows.set_index("kind").activations[kind] for kind in KINDS)
        sizes = f"{lora / GB:.3f} | {frozen / GB:.3f} | {1 - frozen / lora:.1%} | {thawed / GB:.3f}"
        lines.append(f"| {model} | {precision} | {adapted} | {batch} x {tokens:,} | {levers} | {sizes} |")
    return "\n".join(lines) + "\n"


READING = """\
# What LoRA-FA saves

LoRA-FA freezes the first factor A of every update, so that the input of a projection need not be kept for A's gradient.
Whether that saves memory depends on two things.

**Whether A is frozen when a step runs.** peft's `create_lorafa_optimizer` freezes A once, when it is called. peft's
context `disable_adapter` lets every factor require a gradient again when it ends, and no message says so. The optimizer
goes on to update B alone; A gets gradients that nobody reads, and its input is kept for them. peft's comparison of
methods measures the loss of the model without its adapter under that context since July 14, 2026, after the optimizer
was made: what LoRA-FA saved before, it has not saved since.

{published}
The 0.2 % that were left are the two moments of A, which that optimizer does not hold; the prediction holds them.
`lora-fa` here names A among the factors that peft keeps frozen.

**Who else keeps that input.** Nobody does in most layers: projections with frozen weights keep nothing, norms keep what
they read and not what they give. So one tensor of a layer's input goes for each input that is adapted: in float32 one
for queries and values together; with weights in bfloat16 a copy in float32 for each projection, because peft holds its
factors in float32. The rest of what a layer keeps stays. Where all linear layers are adapted there are more such
inputs, among them that of the down projection, which is several times as wide. Under `+checkpoint` only inputs of
layers are kept, and what is saved is a part of the one layer that runs again; it shows where that layer is the peak.

Activations at the peak of forward and backward, predicted for {profile}:

{table}"""


def main(arguments: list[str] | None = None) -> int:
    """Predict, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", default="a100-80gb")
    options = parser.parse_args(arguments)
    try:
        made(options.out)  # before the work
        profile = find_profile(options.profile)
        frame = predicted_table(CELLS, profile)
        published = published_table("llama-3.2-3b", 4, 768)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    frame.to_csv(options.out / "table.csv", index=False)
    text = READING.format(published=published, profile=profile.device, table=table(frame))
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
