"""Every method on every backbone, predicted from few layers and from all of them: whether both are the same.

    python reports/campaigns/extrapolation.py reports/extrapolation          # half an hour on one core

Each backbone is small but deep (MODELS), and predicted for an A100 in bfloat16 in two shapes. The first shape is told
from three shallow models of that shape, the second from what the first shape tells of deeper models and one shallow
model of its own (prediction/deepened.py). Compared with a trace of all layers are the events, one by one, the numbers
of parameters, the attention kernels, what a counter would see in each step, and replays by torch's allocator, with
expandable segments and within a capacity that does not suffice among them. Writes grid.csv with a row a cell, and
summary.md, which is also printed. Exits 1 where something differs, or ends in anything but a result or a refusal. It
may be interrupted and called again: what is in grid.csv is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import DONE, OVER_BUDGET, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.models import image_tokens, known_config
from meftbench.plan.point import cell_of
from meftbench.prediction.allocator import AllocatorSettings, Replayed
from meftbench.prediction.loops import expanded
from meftbench.prediction.predict import Predicted
from meftbench.prediction.tracer import Traced, Tracer
from meftbench.records.store import made, write_whole
from meftbench.report.render.verdicts import markdown_table

PROFILE = find_profile("a100-80gb")
_SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = _SMALL | {"vocab_size": 512}
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}
_GEMMA = _DECODER | {"query_pre_attn_scalar": 16, "sliding_window": 32}
_IMAGES = _SMALL | {"image_size": 64, "patch_size": 16}
_BART = {"d_model": 64, "vocab_size": 512} | {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in (("attention_heads", 4), ("ffn_dim", 128))
}
_OPT = {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 128, "vocab_size": 512, "word_embed_proj_dim": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": 32}
_HYBRID = (
    _DECODER
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
)
_HYBRID_EXPERTS = {name: value for name, value in _HYBRID.items() if name != "intermediate_size"} | _SHARED
# By backbone: a model of the catalogue, its layers, and what makes it small. Where layers of several kinds take turns,
# as many layers as it takes to tell them from fewer: 5 turns.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "bert": ("bert-base", 12, _TEXT),
    "roberta": ("roberta-base", 12, _TEXT),
    "bart": ("bart-base", 12, _BART),
    "opt": ("opt-125m", 12, _OPT),
    "vit": ("vit-base", 12, _IMAGES),
    "deit": ("deit-base", 12, _IMAGES),
    "llama": ("llama-3.2-1b", 12, _DECODER),
    "mistral": ("mistral-7b-v0.1", 12, _DECODER | {"sliding_window": 32}),
    "qwen2": ("qwen2.5-0.5b", 12, _TEXT | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3-0.6b", 12, _DECODER),
    "mixtral": ("mixtral-8x7b", 12, _DECODER | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3-30b-a3b", 12, _DECODER | _EXPERTS),
    "qwen3_5_text": ("qwen3.5-0.8b", 20, _HYBRID),
    "qwen3_5_moe_text": ("qwen3.5-35b-a3b", 20, _HYBRID_EXPERTS),
    "qwen3_next": ("qwen3-next-80b-a3b", 20, _HYBRID | _SHARED),
    "gemma2": ("gemma-2-2b", 12, _GEMMA),
    "gemma3_text": ("gemma-3-1b", 30, _GEMMA),
}
SHAPES = ((2, 64), (4, 96))  # samples, and tokens of each; an image is 17 tokens or 18
COLUMNS = ("backbone", "method", "shape", "outcome", "reason", "rule", "traced_layers", "layers", "events")
STEPS = 2  # the first, which makes the optimizer's state, and one like every later one


class WatchedTracer(Tracer):
    """A tracer that keeps which cells it traced directly."""

    def __init__(self, **options: Any) -> None:
        super().__init__(PROFILE, **options)
        self.cells: list[Cell] = []

    def directly(self, cell: Cell, steps: int = STEPS, padding: float = 0.0) -> Traced:
        self.cells.append(cell)
        return super().directly(cell, steps, padding)


@dataclass(frozen=True)
class Case:
    """A model of the grid with a method."""

    backbone: str
    method: str

    def cell(self, samples: int, tokens: int) -> Cell:
        """Raises UserError: the method does not apply to the model."""
        name, layers, config = MODELS[self.backbone]
        fields = ("encoder_layers", "decoder_layers") if self.backbone == "bart" else ("num_hidden_layers",)
        own_tokens = image_tokens(known_config(f"{name}@random", config) or {})
        # BART's classification looks at tokens' values, as its masks do with other kernels: a trace has none.
        head = {"head": "seq2seq_lm", "attention": "eager"} if self.backbone == "bart" else {}
        return cell_of(
            "extrapolation",
            {
                "model": {"name": f"{name}@random", "config": config | dict.fromkeys(fields, layers)},
                "method": self.method,
                "batch_size": samples,
                "precision": "bf16",
                "device": f"predicted:{PROFILE.name}",
                "sequence_length": own_tokens or tokens,
            }
            | head,
        )


def cases() -> Iterator[Case]:
    """Every method on every backbone of the catalogue."""
    yield from (Case(backbone, method) for backbone, method in itertools.product(BACKBONES, METHODS))


def tried(case: Case) -> list[dict[str, Any]]:
    """The rows of grid.csv, one for each shape: whether the model told from fewer layers is the traced one, or why the
    method is refused."""
    few, all_layers = WatchedTracer(), WatchedTracer(extrapolate=False)
    return [_compared(case, shape, few, all_layers) for shape in SHAPES]


def _compared(case: Case, shape: tuple[int, int], few: WatchedTracer, all_layers: WatchedTracer) -> dict[str, Any]:
    layers = MODELS[case.backbone][1]
    row: dict[str, Any] = {"backbone": case.backbone, "method": case.method, "shape": "x".join(map(str, shape))}
    row |= {"layers": layers, "reason": ""}
    traced_before = len(few.cells)
    try:
        cell = case.cell(*shape)
        told, traced = few(cell, STEPS), all_layers(cell, STEPS)
        found = differences(told, traced)
    except UserError as refused:
        return row | {"outcome": "refused", "reason": f"{refused.what}; {refused.cure}"}
    except Exception as error:  # a fault of the program, which the grid is to show
        return row | {"outcome": "error", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    cells = few.cells[traced_before:]
    direct = cell in cells
    reason = "; ".join(found) or (next(reversed(few.irregular.values()), "too few layers") if direct else "")
    return row | {
        "outcome": "different" if found else "same",
        "reason": reason,
        "rule": "direct" if direct else "extrapolated",
        "traced_layers": sum(_layers_of(one) for one in cells),
        "events": len(expanded(traced.trace)),
    }


def _layers_of(cell: Cell) -> int:
    config = cell.model_config_overrides
    return int(config.get("num_hidden_layers") or config["encoder_layers"])


def differences(told: Traced, traced: Traced) -> list[str]:
    """What of a trace that was told from fewer layers is not that of the one in which every layer was traced."""
    found = []
    events = (expanded(told.trace), expanded(traced.trace))
    for column in ("what", "storage", "nbytes"):
        if not np.array_equal(*(getattr(trace, column) for trace in events)):
            found.append(f"{column} of the events")
    for name in ("sizes", "attention", "tokens"):
        if getattr(told, name) != getattr(traced, name):
            found.append(name)
    first, second = (Predicted(PROFILE, one, AllocatorSettings(), steps=STEPS - 1) for one in (told, traced))
    if first.observed != second.observed:
        found.append("what a counter sees")
    peak = second.replayed.reserved_peak
    for settings in (
        AllocatorSettings(),
        AllocatorSettings(expandable_segments=True),
        AllocatorSettings(capacity=peak * 9 // 10),
        AllocatorSettings(capacity=peak // 2),
    ):
        if replayed(first, settings) != replayed(second, settings):
            found.append(f"the replay in {settings}")
    return found


def replayed(predicted: Predicted, settings: AllocatorSettings) -> Replayed:
    """The allocator's statistics, in which what does not fit has no number: that of a storage in a loop depends on how
    many rounds are noted instead of being in the trace."""
    found = predicted.replayed_in(settings)
    return found if found.oom is None else replace(found, oom=found.oom._replace(key=0))


def read_grid(file: Path) -> pd.DataFrame:
    """grid.csv, what was not traced as 0."""
    grid = pd.read_csv(file, keep_default_na=False)
    for name in ("traced_layers", "layers", "events"):
        grid[name] = pd.to_numeric(grid[name]).fillna(0).astype(int)
    return grid


def broken(grid: pd.DataFrame) -> list[str]:
    """A sentence for each cell that is not the same both ways, or ended in a fault."""
    return [
        f"{row.backbone}: {row.method} at {row.shape}: {row.outcome}: {row.reason}"
        for row in grid.itertuples()
        if row.outcome in ("different", "error")
    ]


def summary(grid: pd.DataFrame, faults: list[str]) -> str:
    """Counts, how many layers were traced by backbone, why cells were traced directly, refusals, what differs."""
    counts = grid["outcome"].value_counts()
    compared = grid[grid.outcome.isin(["same", "different"])]
    first, second = (compared[compared["shape"] == "x".join(map(str, shape))] for shape in SHAPES)
    lines = []
    for backbone in dict.fromkeys(grid.backbone):
        own = compared[compared.backbone == backbone]
        lines.append(
            (
                backbone,
                f"{MODELS[backbone][1]}",
                f"{len(own)}",
                f"{(own.outcome == 'same').sum()}",
                f"{(own.rule == 'direct').sum()}",
                *(f"{one[one.backbone == backbone].traced_layers.median():.0f}" for one in (first, second)),
            )
        )
    head = ("backbone", "layers", "cells", "the same", "traced directly", "layers traced", "in the second shape")
    to_do = len(SHAPES) * len(list(cases())) - len(grid)
    parts = [
        "# Few layers and all of them",
        f"{len(grid):,} cells, small models predicted for an A100 in bfloat16 (samples × tokens: "
        + ", ".join(" × ".join(map(str, shape)) for shape in SHAPES)
        + f"): {counts.get('same', 0):,} the same both ways, {counts.get('different', 0):,} different, "
        f"{counts.get('refused', 0):,} refused in one line, {counts.get('error', 0):,} ended in a fault. "
        f"{compared.events.sum():,} events were compared. Of {len(compared):,} compared cells "
        f"{(compared.rule == 'direct').sum():,} were traced directly, as they do not follow from fewer layers."
        + (f" {to_do:,} are still to be compared." if to_do else ""),
        "## By backbone",
        markdown_table(head, lines),
        "Layers traced are those of all traces of a cell together, the median over methods.",
        "## Traced directly",
        _by_reason(compared[compared.rule == "direct"], with_methods=True),
        "## Refusals",
        _by_reason(grid[grid.outcome == "refused"], with_methods=False),
        "## What does not hold",
        "\n".join(f"- {fault}" for fault in faults) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def _by_reason(rows: pd.DataFrame, *, with_methods: bool) -> str:
    """A table of reasons, the most frequent first."""
    if rows.empty:
        return "None."
    lines = []
    for reason, of_reason in sorted(rows.groupby("reason"), key=lambda pair: -len(pair[1])):
        methods = (", ".join(dict.fromkeys(of_reason.method)),) if with_methods else ()
        lines.append((f"{len(of_reason)}", str(reason), *methods))
    return markdown_table(("cells", "reason", *(("methods",) if with_methods else ())), lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbones", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="BACKBONE")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD")
    options = parser.parse_args(arguments)
    try:
        made(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    file = options.out / "grid.csv"
    known: set[Case] = set()
    if file.exists():
        known = {Case(row.backbone, row.method) for row in pd.read_csv(file, keep_default_na=False).itertuples()}
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if not known:
            writer.writeheader()
        for case in cases():
            if case.backbone in options.backbones and case.method in options.methods and case not in known:
                writer.writerows(tried(case))
                stream.flush()
    grid = read_grid(file)
    faults = broken(grid)
    write_whole(options.out / "summary.md", summary(grid, faults))
    print(summary(grid, faults))
    return OVER_BUDGET if faults else DONE


if __name__ == "__main__":
    sys.exit(main())
