"""Activation memory of exact reversal beside what people use, by depth and by sequence length, BERT-base's width.

    python reports/campaigns/exact_memory.py reports/exact-memory

Every step is traced, not computed (meftbench.prediction.trace): the bytes are those the CPU step allocates, counted.
Writes depth.csv, length.csv, buffers.csv, a plot of each of the first two, and summary.md with the tables, which is
also printed. fp32, attention dropout 0 (so that the CPU takes a fused attention kernel), hidden dropout as published.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.prediction.trace import count_uncomputed
from meftbench.probes.counted_metrics import peak_buffers
from meftbench.records.store import made

GiB = 2**30
HIDDEN = 768
DEPTHS = (12, 24, 48)
LENGTHS = (2048, 8192, 32768, 65536)
CARD = 24 * GiB
EXACT: tuple[str, dict[str, Any]] = ("meft1-exact", {"tiles": 16})
BY_DEPTH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora+checkpoint", {}),
    ("lora+checkpoint+tiled_mlp", {}),
    ("lora+checkpoint+offload", {}),
    ("meft1", {}),
    ("meft1-exact", {}),
    ("meft1-exact", {"tiles": 5}),
    EXACT,
    ("meft3-exact", {"tiles": 16}),
)
BY_LENGTH = (("full", {}), ("lora", {}), *BY_DEPTH[:5], ("meft1-exact", {"tiles": 32}))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def a_cell(method: str, params: dict[str, Any], batch: int, length: int, layers: int, precision: str = "fp32") -> Cell:
    config = {"attention_probs_dropout_prob": 0.0, "num_hidden_layers": layers}
    return Cell.of(
        method,
        method_params=params,
        model="bert-base@random",
        model_config_overrides=config | ({"max_position_embeddings": length} if length > 512 else {}),
        batch_size=batch,
        sequence_length=length,
        precision=precision,
    )


def by_depth(depths: tuple[int, ...], batch: int = 8, length: int = 512) -> pd.DataFrame:
    """One row a method, precision and depth; a stream is batch × tokens × hidden × 4 bytes."""
    stream, rows = batch * length * HIDDEN * 4, []
    settings = [(m, p, "fp32") for m, p in BY_DEPTH] + [(m, p, "bf16-autocast") for m, p in (BY_DEPTH[0], EXACT)]
    for method, params, precision in settings:
        for layers in depths:
            cell = a_cell(method, params, batch, length, layers, precision)
            peak = count_uncomputed(cell, warmup=0).activation_peak
            rows.append((cell.method_label, precision, layers, peak, peak / stream))
            print(f"{cell.method_label} {precision} {layers} layers: {peak / stream:.2f} streams", file=sys.stderr)
    frame = pd.DataFrame(rows, columns=["method", "precision", "layers", "activation_peak_bytes", "streams"])
    baseline = frame[(frame.method == "lora+checkpoint") & (frame.precision == "fp32")].set_index("layers").streams
    frame["of_lora_checkpoint"] = frame.streams / frame.layers.map(baseline)
    return frame


def slopes(depth: pd.DataFrame, elements: int) -> pd.DataFrame:
    """Bytes that one more layer costs for each of the batch × tokens × hidden elements, from the two deepest models."""
    rows = []
    for (method, precision), group in depth.groupby(["method", "precision"], sort=False):
        (low, high) = group.sort_values("layers").tail(2).itertuples()
        grown = high.activation_peak_bytes - low.activation_peak_bytes
        rows.append((method, precision, grown / (high.layers - low.layers) / elements))
    return pd.DataFrame(rows, columns=["method", "precision", "bytes_per_layer_and_element"])


def by_length(lengths: tuple[int, ...], layers: int) -> pd.DataFrame:
    """One sample; one row a method and length: activation and whole peak."""
    rows = []
    for method, params in BY_LENGTH:
        for length in lengths:
            cell = a_cell(method, params, 1, length, layers)
            found = count_uncomputed(cell)
            rows.append((cell.method_label, length, found.activation_peak, found.peak.total))
            print(f"{cell.method_label} {length} tokens: {found.peak.total / GiB:.2f} GiB", file=sys.stderr)
    return pd.DataFrame(rows, columns=["method", "tokens", "activation_peak_bytes", "peak_bytes"])


def longest(length: pd.DataFrame, card: int, layers: int) -> pd.DataFrame:
    """Tokens of one sample, to 64, with which a step peaks just below `card` bytes; verified by tracing that length.

    Sought by regula falsi from the two longest lengths: `auto` changes its tiles with the length, so no line holds.
    Without the CUDA context and fragmentation; positions as many as tokens.
    """
    rows = []
    for (label, group), (method, params) in zip(length.groupby("method", sort=False), BY_LENGTH, strict=True):
        (low, high) = [(row.tokens, row.peak_bytes) for row in group.sort_values("tokens").tail(2).itertuples()]
        for _ in range(6):
            tokens = int(high[0] + (card - high[1]) * (high[0] - low[0]) / (high[1] - low[1])) // 64 * 64
            peak = count_uncomputed(a_cell(method, params, 1, tokens, layers)).peak.total
            if 0 <= card - peak <= card // 200:
                break
            low, high = high, (tokens, peak)
        else:
            raise UserError("exact_memory", f"found no length at which {label} fills the card", "name other --lengths")
        rows.append((label, tokens, peak, peak / tokens))
        print(f"{label} longest: {tokens} tokens, {peak / GiB:.2f} GiB", file=sys.stderr)
    return pd.DataFrame(rows, columns=["method", "longest_tokens", "peak_bytes", "bytes_per_token"])


def buffers(layers: int = 12, batch: int = 8, length: int = 512) -> pd.DataFrame:
    """What is alive at the peak of exact reversal."""
    found = count_uncomputed(a_cell(*EXACT, batch, length, layers))
    frame = pd.DataFrame(peak_buffers([found]).value)
    frame.insert(1, "streams", frame["bytes"] / (batch * length * HIDDEN * 4))
    return frame


def plot_by_depth(frame: pd.DataFrame, ax: Axes) -> None:
    """Activation memory (streams) against layers, a line a method, fp32."""
    for colour, (method, rows) in zip(
        COLOURS, frame[frame.precision == "fp32"].groupby("method", sort=False), strict=False
    ):
        style = "-" if "meft" in method else "--"
        ax.plot(rows.layers, rows.streams, style, color=colour, marker="o", label=method)
    ax.set(xlabel="layers", ylabel="activation memory (streams, counted)", ylim=(0, None), xticks=DEPTHS)
    ax.set_title("BERT-base width, 8 × 512 tokens, fp32; a stream is 12 MiB", fontsize=10)
    ax.legend(fontsize=8)


def plot_by_length(frame: pd.DataFrame, ax: Axes) -> None:
    """Peak memory (GiB) against tokens of one sample, a line a method."""
    for colour, (method, rows) in zip(COLOURS, frame.groupby("method", sort=False), strict=False):
        style = "-" if "meft" in method else "--"
        ax.plot(rows.tokens, rows.peak_bytes / GiB, style, color=colour, marker="o", label=method)
    ax.axhline(CARD / GiB, color="#777777", linewidth=1)
    ax.text(LENGTHS[-1], CARD / GiB * 0.9, "24 GiB", color="#555555", fontsize=9, ha="right", va="top")
    ax.set(xscale="log", yscale="log", xlabel="tokens of one sample", ylabel="peak memory (GiB, counted)")
    ax.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    ax.minorticks_off()
    ax.set_yticks([1, 10], ["1", "10"])
    ax.set_title("BERT-base, one sample, fp32", fontsize=10)
    ax.legend(fontsize=8)


def main(arguments: list[str] | None = None) -> int:
    """Trace, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--layers", type=int, default=12, help="of the tables by length")
    options = parser.parse_args(arguments)
    try:
        if len(options.depths) < 2 or len(options.lengths) < 2:
            raise UserError("exact_memory", "a slope takes two depths and two lengths", "name at least two of each")
        made(options.out)  # before the work
        depth, length = by_depth(tuple(options.depths)), by_length(tuple(options.lengths), options.layers)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    alive = buffers(min(options.depths))
    for name, frame in {"depth": depth, "length": length, "buffers": alive}.items():
        frame.to_csv(options.out / f"{name}.csv", index=False)
    for name, frame, plot in (("depth", depth, plot_by_depth), ("length", length, plot_by_length)):
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        plot(frame, figure.subplots())
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            figure.savefig(options.out / f"{name}.{suffix}", metadata=metadata)
    text = summary(depth, slopes(depth, 8 * 512 * HIDDEN), length, longest(length, CARD, options.layers), alive)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def summary(*frames: pd.DataFrame) -> str:
    """The five tables in Markdown."""
    depth, slope, length, longest_, alive = frames
    layers = depth.pivot_table(index=["method", "precision"], columns="layers", values="streams", sort=False)
    share = depth.pivot_table(index=["method", "precision"], columns="layers", values="of_lora_checkpoint", sort=False)
    peaks = length.assign(GiB=length.peak_bytes / GiB).pivot_table(
        index="method", columns="tokens", values="GiB", sort=False
    )
    parts = [
        ("Activation memory in streams by layers (counted, 8 × 512 tokens)", layers.round(2).reset_index()),
        ("The same, as a share of lora+checkpoint in fp32", share.round(3).reset_index()),
        ("Bytes a further layer costs, for each element of the hidden state", slope.round(3)),
        ("Peak memory in GiB by tokens of one sample (counted)", peaks.round(2).reset_index()),
        ("Longest sample on 24 GiB, CUDA context and fragmentation aside (counted at that length)", longest_.round(0)),
        (
            "What is alive at the peak of meft1-exact",
            alive[["streams", "count", "op", "shape", "dtype", "place"]].round(2),
        ),
    ]
    return "\n".join(f"## {title}\n\n{_markdown(frame)}\n" for title, frame in parts)


def _markdown(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [[f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
