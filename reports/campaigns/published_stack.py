"""A published stack of memory optimisations, each on top of the one before, beside what is predicted for it.

    python reports/campaigns/published_stack.py reports/published

torchtune's README (0.5.0, BSD-3) has the peak of "memory active" for Llama-3.2-3B on one A100, two samples of 4,096
tokens, bfloat16, as packing, compilation, a chunked loss, checkpointing, updates in backward, offloading and 8-bit
AdamW come one by one, and for LoRA and QLoRA. Here transformers' Llama is predicted with this project's levers, and
with what differs in torchtune: keys and values are repeated before attention, the loss has eight chunks of which all
logits are kept, and weights of LoRA are in bfloat16. Writes stack.csv and stack.md, which is also printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import transformers.integrations.sdpa_attention as sdpa_attention
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.methods import Applied
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.predict import predict
from meftbench.prediction.trace import uncomputed_model
from meftbench.prediction.tracer import Tracer
from meftbench.records.store import made, write_whole
from meftbench.report.render.verdicts import markdown_table

GiB = 2**30
CHUNKS = 8  # of torchtune's CEWithChunkedOutputLoss
LORA = {
    "rank": 64,
    "alpha": 128.0,
    "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # of torchtune's recipes for this model, 0.4.0 to 0.6.1


@dataclass(frozen=True)
class Row:
    """A row of the published table. gib: as published.  loss: how the loss is computed.  fields: of the cell."""

    name: str
    gib: float
    method: str
    loss: str
    fields: dict[str, Any] = field(default_factory=dict)
    note: str = ""


_REST = "full+checkpoint+offload+optimizer_in_backward"
_COMPILED = "layers compiled, as torch's partitioner parts them; the loss is taken as not compiled"
_ABOVE = "about the gradient of one chunk of logits (0.24 GiB) more than published; why is not known"
ROWS = (
    Row("packed", 60.0, "full", "plain"),
    Row("compiled", 51.0, "full+compile", "plain", note=_COMPILED),
    Row("chunked loss", 42.9, "full+compile", "chunks", note=_COMPILED),
    Row("checkpointing", 24.9, "full+checkpoint", "chunks"),
    Row("optimizer in backward", 23.1, "full+checkpoint+optimizer_in_backward", "chunks"),
    Row("activation offload", 21.8, _REST, "chunks"),
    Row(
        "8-bit AdamW",
        17.6,
        _REST,
        "chunks",
        {"optimizer": "adamw-8bit", "optimizer_impl": None},
        "bitsandbytes, embedding states in 32 bits as transformers' Trainer has them; the source names no library",
    ),
    Row("LoRA", 8.5, "lora+checkpoint+offload", "chunks", {"method_params": LORA}, note=_ABOVE),
    Row("QLoRA", 4.6, "lora+checkpoint+offload", "chunks", {"method_params": LORA, "precision": "nf4"}, note=_ABOVE),
)
BASE = "The first row of the source, 25.5 GiB without packing, has samples of unknown lengths and is left out."


class _CompiledLoss(torch.autograd.Function):
    """What a compiled cross-entropy keeps: the logits (N, V) as they are, and a float32 for each token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, logits.new_empty(logits.shape[0], dtype=torch.float32), labels)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def _plain(model: Any, h: Tensor, labels: Tensor) -> Tensor:
    logits = model.lm_head(h).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1))


def _in_chunks(model: Any, h: Tensor, labels: Tensor) -> Tensor:
    logits = [model.lm_head(part) for part in h.chunk(CHUNKS, 1)]
    pairs = zip(logits, labels.chunk(CHUNKS, 1), strict=True)
    losses = [_CompiledLoss.apply(part.view(-1, part.shape[-1]), of_part.reshape(-1)) for part, of_part in pairs]
    return torch.stack(losses).sum()


LOSSES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {"plain": _plain, "chunks": _in_chunks}


def _never(*_: Any) -> bool:
    return False


@contextmanager
def as_in_torchtune(loss: str) -> Iterator[None]:
    """Within it, transformers' Llama repeats keys and values, and computes its loss as torchtune does."""

    def forward(self: Any, input_ids: Tensor, labels: Tensor, **_: Any) -> CausalLMOutputWithPast:
        h = self.model(input_ids=input_ids).last_hidden_state
        shifted = torch.hstack((labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)))
        return CausalLMOutputWithPast(loss=LOSSES[loss](self, h, shifted))

    with (
        mock.patch.object(LlamaForCausalLM, "forward", forward),
        mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", _never),
    ):
        yield


def in_half(cell: Cell) -> Applied:
    """The cell's model, whose adapters are in bfloat16 as torchtune's are."""
    applied = uncomputed_model(cell)
    for name, parameter in applied.trained().items():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return applied


def predicted(row: Row) -> int:
    """Peak allocated in bytes. Raises UserError: the cell cannot be traced."""
    fields = {"precision": "bf16", "optimizer_impl": "fused"} | row.fields
    cell = Cell.of(
        row.method, model="llama-3.2-3b@random", batch_size=2, sequence_length=4096, head="causal_lm", **fields
    )
    profile = find_profile("a100-80gb")
    with as_in_torchtune(row.loss):
        found = predict(cell, profile, tracer=Tracer(profile, made=in_half), settings=AllocatorSettings())
    return found.replayed.steps[-1].peak.allocated


def table(rows: tuple[Row, ...] = ROWS) -> pd.DataFrame:
    """A row for each of `rows`."""
    lines = []
    for row in rows:
        nbytes = predicted(row)
        lines.append(
            {
                "added": row.name,
                "predicted_as": row.method,
                "published_gib": row.gib,
                "predicted_bytes": nbytes,
                "error": nbytes / (row.gib * GiB) - 1,
                "note": row.note,
            }
        )
        print(f"{row.name} ...", file=sys.stderr, flush=True)
    return pd.DataFrame(lines)


def summary(found: pd.DataFrame) -> str:
    """The table in Markdown, and what it does not have."""
    head = ("added to the row above", "predicted as", "published GiB", "predicted GiB", "error", "note")
    lines = [
        (
            r.added,
            f"`{r.predicted_as}`",
            str(r.published_gib),
            f"{r.predicted_bytes / GiB:.2f}",
            f"{r.error:+.1%}",
            r.note,
        )
        for r in found.itertuples()
    ]
    within = sum(abs(error) <= 0.03 for error in found["error"])
    source = "torchtune 0.5.0, README: Llama-3.2-3B, one A100, 2 × 4,096 tokens, bfloat16, peak memory active."
    ending = f"{within} of {len(found)} rows are within 3 %. LoRA and QLoRA do not build on the rows above them. {BASE}"
    return f"# A published stack of levers\n\n{source} Predicted.\n\n{markdown_table(head, lines)}\n\n{ending}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    try:
        made(options.out)
        found = table()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    found.to_csv(options.out / "stack.csv", index=False)
    write_whole(options.out / "stack.md", summary(found))
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
