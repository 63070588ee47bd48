"""Every lever with every method on every kind of backbone, alone and in pairs: whether it runs, and what it saves.

    python reports/campaigns/lever_grid.py reports/lever-grid          # half an hour on one core

Each cell is predicted for an A100 from a trace of a small model, so that levers which need CUDA are there too. A lever
alone must lower the number that it is for (SAVES); a pair must not peak above the worse of its two levers alone. Writes
grid.csv with a row a cell, and summary.md, which is also printed. Exits 1 where something does not hold, or ends in
anything but a result or a refusal. It may be interrupted and called again: what is in grid.csv is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS, Reversible
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import DONE, OVER_BUDGET, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.point import cell_of
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.predict import predict
from meftbench.records.store import made, write_whole
from meftbench.report.render.verdicts import markdown_table

METHOD_NAMES = (
    *("full", "lora", "lora-fa", "houlsby", "parallel", "prefix-tuning", "mezo", "meft1", "meft1-exact"),
    *("meft3-exact", "bdia", "midpoint"),
)
_DECODER = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8192}
_SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# By name: model, its configuration, and the length of a sequence.
BACKBONES: dict[str, tuple[str, dict[str, Any], int]] = {
    "encoder (bert)": ("bert-base@random", _SMALL | {"num_attention_heads": 4, "vocab_size": 1024}, 256),
    "decoder (llama)": ("llama-3.2-1b@random", _SMALL | _DECODER, 256),
    "decoder (opt)": (
        "opt-125m@random",
        {"num_hidden_layers": 4, "hidden_size": 64, "ffn_dim": 256, "num_attention_heads": 4, "vocab_size": 8192}
        | {"word_embed_proj_dim": 64},
        256,
    ),
    "images (vit)": ("vit-base@random", _SMALL | {"num_attention_heads": 4, "image_size": 224, "patch_size": 16}, 197),
    "mixture (qwen3-moe)": ("qwen3-30b-a3b@random", _SMALL | _DECODER | _EXPERTS, 256),
}
PAIRED = ("encoder (bert)", "decoder (llama)")
# The metric that a lever is for, and which must fall where the lever is alone.
ACTIVATIONS, BETWEEN, UPDATE = "activation_peak_bytes", "baseline_allocated_bytes", "optimizer_peak_bytes"
SAVES = {
    "checkpoint": ACTIVATIONS,
    "offload": ACTIVATIONS,
    "tiled_mlp": ACTIVATIONS,
    "chunked_loss": ACTIVATIONS,
    "liger_loss": ACTIVATIONS,
    "cut_loss": ACTIVATIONS,
    "optimizer_offload": BETWEEN,
    "weight_offload": BETWEEN,
    "optimizer_in_backward": UPDATE,
}
PEAK = "peak_allocated_bytes"
TOLERANCE = 0.02  # of a pair: what is in flight, and rounding to blocks
OF_COMPILED = 0.2  # with compile, of which a prediction holds the temporaries of uncompiled operators
COLUMNS = ("backbone", "method", "levers", "outcome", "reason", PEAK, ACTIVATIONS, BETWEEN, UPDATE)


@dataclass(frozen=True)
class Case:
    """A cell of the grid. levers: joined by +, none: ""."""

    backbone: str
    method: str
    levers: str

    @property
    def label(self) -> str:
        return "+".join(filter(None, [self.method, self.levers]))


def cases() -> Iterator[Case]:
    """All cells: methods without levers, with each, and with pairs on the backbones of PAIRED."""
    for backbone, method in itertools.product(BACKBONES, METHOD_NAMES):
        sets = ["", *LEVERS]
        sets += ["+".join(pair) for pair in itertools.combinations(LEVERS, 2)] if backbone in PAIRED else []
        yield from (Case(backbone, method, levers) for levers in sets)


def tried(case: Case) -> dict[str, Any]:
    """A row of grid.csv: what the prediction of the case gives, or why it is refused."""
    model, config, length = BACKBONES[case.backbone]
    row: dict[str, Any] = {"backbone": case.backbone, "method": case.method, "levers": case.levers, "reason": ""}
    try:
        cell: Cell = cell_of(
            "lever-grid",
            {
                "model": {"name": model, "config": config},
                "method": case.label,
                "batch_size": 4,
                "sequence_length": length,
                "precision": "bf16",
                "device": "predicted:a100-80gb",
            },
        )
        found = predict(cell, find_profile("a100-80gb"), settings=AllocatorSettings())
    except UserError as refused:
        return row | {"outcome": "refused", "reason": f"{refused.what}; {refused.cure}"}
    except Exception as error:  # a fault of the program, which the grid is to show
        return row | {"outcome": "error", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    metrics = found.metrics()
    return row | {"outcome": "runs"} | {name: metrics[name].value for name in (PEAK, ACTIVATIONS, BETWEEN, UPDATE)}


def read_grid(file: Path) -> pd.DataFrame:
    """grid.csv; bytes are 0 where a cell has none."""
    grid = pd.read_csv(file, keep_default_na=False)
    for name in (PEAK, ACTIVATIONS, BETWEEN, UPDATE):
        grid[name] = pd.to_numeric(grid[name]).fillna(0)
    return grid


def broken(grid: pd.DataFrame) -> list[str]:
    """A sentence for each cell that ended in a fault, and for each lever or pair that does not save what it must."""
    rows = {(r.backbone, r.method, r.levers): r for r in grid.itertuples()}
    found = [f"{r.backbone}: {r.method}+{r.levers}: {r.reason}" for r in grid.itertuples() if r.outcome == "error"]
    for (backbone, method, levers), row in rows.items():
        names = levers.split("+") if levers else []
        alone = [rows[backbone, method, name] for name in names if (backbone, method, name) in rows]
        plain = rows.get((backbone, method, ""))
        if row.outcome != "runs" or plain is None or plain.outcome != "runs":
            continue
        where = f"{backbone}: {method}+{levers}"
        if len(names) == 1 and not _saves(names[0], method, row, plain):
            metric = SAVES[names[0]]
            found.append(
                f"{where}: {metric} {getattr(row, metric):,.0f}, without the lever {getattr(plain, metric):,.0f}"
            )
        if len(names) == 2 and all(other.outcome == "runs" for other in alone):
            worse = max(other.peak_allocated_bytes for other in alone)
            tolerance = OF_COMPILED if "compile" in names else TOLERANCE
            if row.peak_allocated_bytes > (1 + tolerance) * worse:
                found.append(f"{where}: peak {row.peak_allocated_bytes:,.0f}, the worse lever alone {worse:,.0f}")
    return found


def _saves(lever: str, method: str, row: Any, plain: Any) -> bool:
    """Whether a lever alone lowers what it is for, where it must."""
    metric = SAVES.get(lever)
    if metric is None:
        return True  # of +compile only what layers keep for backward falls, which need not be the peak
    reversible = issubclass(METHODS[method].settings, Reversible)
    if reversible and (lever == "offload" or not LEVERS[lever].adds_to_reversal):
        return True  # reversal has done it already
    if method == "mezo":
        return bool(getattr(row, metric) <= getattr(plain, metric))
    return bool(getattr(row, metric) < getattr(plain, metric))


def summary(grid: pd.DataFrame, faults: list[str]) -> str:
    """Counts, the saving of each lever with each method on the decoder, the reasons of refusals, what is broken."""
    counts = grid["outcome"].value_counts()
    head = ("method", *(f"+{lever}" for lever in LEVERS))
    decoder = {(r.method, r.levers): r for r in grid[grid.backbone == "decoder (llama)"].itertuples()}
    lines = []
    for method in METHOD_NAMES:
        plain = decoder[method, ""]
        texts = [_share(decoder[method, lever], plain) for lever in LEVERS]
        lines.append((method, *texts))
    reasons = grid[grid.outcome == "refused"].groupby("reason").size().sort_values(ascending=False)
    refusals = [(f"{count}", str(reason)) for reason, count in reasons.items()]
    parts = [
        "# Levers by methods by backbones",
        f"{len(grid):,} cells, predicted for an A100 from traces of small models in bfloat16: "
        + ", ".join(f"{counts.get(name, 0):,} {text}" for name, text in _OUTCOMES.items())
        + f". {len(faults)} do not hold.",
        "## What each lever leaves of the peak, on a decoder (Llama, 4 layers, 4 × 256 tokens)",
        markdown_table(head, lines),
        "A dash: refused. Shares of the peak allocated without the lever; the peak of a small model need not be what a "
        "lever is for, so that the check is of that lever's own number.",
        "## Refusals",
        markdown_table(("cells", "in one line"), refusals),
        "## What does not hold",
        "\n".join(f"- {fault}" for fault in faults) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


_OUTCOMES = {"runs": "run", "refused": "refused in one line", "error": "ended in a fault"}


def _share(row: Any, plain: Any) -> str:
    if row.outcome != "runs" or plain.outcome != "runs":
        return "-" if row.outcome == "refused" else row.outcome
    return f"{row.peak_allocated_bytes / plain.peak_allocated_bytes:.0%}"


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th cell from the I-th on, for several processes")
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    try:
        made(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    file = options.out / ("grid.csv" if parts == 1 else f"grid-{part}-of-{parts}.csv")
    known: set[tuple[str, ...]] = set()
    if file.exists():
        known = {(r.backbone, r.method, r.levers) for r in pd.read_csv(file, keep_default_na=False).itertuples()}
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if not known:
            writer.writeheader()
        for case in itertools.islice(cases(), part, None, parts):
            if (case.backbone, case.method, case.levers) not in known:
                writer.writerow(tried(case))
                stream.flush()
    if parts > 1:
        return DONE
    grid = read_grid(file)
    faults = broken(grid)
    write_whole(options.out / "summary.md", summary(grid, faults))
    print(summary(grid, faults))
    return OVER_BUDGET if faults else DONE


if __name__ == "__main__":
    sys.exit(main())
