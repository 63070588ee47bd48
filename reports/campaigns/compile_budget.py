"""What torch.compile's memory budget saves for backward, and the peak of the step: they need not fall together.

    python reports/campaigns/compile_budget.py reports/compile-budget

LoRA in fp32, whose gradients are small, compiled in two ways: each layer by itself, as `+compile(budget=...)` does, and
the whole model as one region. torch parts the graph of forward and backward under the budget as it does for inductor;
both halves are then run operator by operator (torch's backend `aot_eager_decomp_partition`), so that every tensor is
counted. inductor fuses operators, and so holds fewer temporaries; what is saved between the halves is the same. Rows
without a budget are uncompiled. Writes table.csv, summary.md, the plot peaks.png and .svg, and environment.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meftbench.errors import UserError
from meftbench.measuring.build import build_step
from meftbench.measuring.requests import describe
from meftbench.measuring.step import Step
from meftbench.methods.levers import compiled
from meftbench.plan.cell import Cell
from meftbench.probes.memory_counted import CountedStep, Observed
from meftbench.probes.storage_counter import StorageCounter
from meftbench.records.store import made
from meftbench.runner import gpus
from meftbench.runner.environment import environment

MiB = 2**20
CPU = torch.device("cpu")
BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
REGIONS = ("layer", "model")
# SmolLM2's width with random weights, of few layers and a small vocabulary, beside whose logits layers can be seen.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m@random": {"num_hidden_layers": 3, "vocab_size": 1024},
    "minilm": {"attention_probs_dropout_prob": 0.0},
}


class _InsideCompiledCode(StorageCounter):
    """A counter that does not make torch run compiled code uncompiled."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class CompiledStep(CountedStep):
    """A step of compiled code, counted. The code must have been compiled by a step before."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self.counter = _InsideCompiledCode(step.device.type)


def a_cell(model: str, method: str, shape: tuple[int, int], config: dict[str, Any]) -> Cell:
    batch, length = shape
    return Cell.of(
        method,
        model=model,
        model_config_overrides=config,
        batch_size=batch,
        sequence_length=length,
        optimizer="sgd",
    )


def counted(cell: Cell, whole_model_budget: float | None = None) -> Observed:
    """A step of `cell` after one that compiles. whole_model_budget: the model is compiled as one region, within it."""
    torch._dynamo.reset()
    step = build_step(cell, CPU)
    if whole_model_budget is not None:
        step.model.compile(backend=compiled.WithinBudget(whole_model_budget), dynamic=False)
    step.run()
    gc.collect()
    with CompiledStep(step) as observing:
        return observing.run()


def measured(model: str, region: str, budget: float, shape: tuple[int, int], config: dict[str, Any]) -> Observed:
    """A step whose regions (`layer` or `model`) are compiled within the budget.

    Raises RuntimeError: the region was not compiled as a whole.
    """
    torch._dynamo.utils.counters.clear()
    if region == "layer":
        found = counted(a_cell(model, f"lora+compile(budget={budget})", shape, config))
    else:
        found = counted(a_cell(model, "lora", shape, config), budget)
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"] or torch._dynamo.utils.counters["graph_break"]:
        raise RuntimeError(f"{model}: torch compiled no {region} as one graph")
    return found


def table_of(models: dict[str, dict[str, Any]], budgets: tuple[float, ...], shape: tuple[int, int]) -> pd.DataFrame:
    """One row for each model, region and budget, and the uncompiled step with and without checkpointing; bytes."""
    rows = []
    for model, config in models.items():
        for method in ("lora", "lora+checkpoint"):
            rows.append((model, method, None, counted(a_cell(model, method, shape, config))))
        for region in REGIONS:
            for budget in budgets:
                rows.append((model, region, budget, measured(model, region, budget, shape, config)))
                print(f"{model} {region} {budget}: {rows[-1][-1].activation_peak / MiB:.1f} MiB", file=sys.stderr)
    return pd.DataFrame(
        [(model, region, budget, seen.saved, seen.activation_peak) for model, region, budget, seen in rows],
        columns=["model", "compiled", "budget", "saved_bytes", "activation_peak_bytes"],
    )


def rises(table: pd.DataFrame) -> pd.DataFrame:
    """For each model and region: at which budget the peak is lowest, what it is there and at the ends, and the steps to
    a lower budget at which less is saved and the peak rises."""
    rows = []
    for (model, region), group in table.dropna(subset=["budget"]).groupby(["model", "compiled"], sort=False):
        downward = group.sort_values("budget", ascending=False)
        lowest = downward.loc[downward.activation_peak_bytes.idxmin()]
        steps = zip(downward.itertuples(), downward.iloc[1:].itertuples(), strict=False)
        rising = [
            f"{high.budget:g} to {low.budget:g}"
            for high, low in steps
            if low.activation_peak_bytes > high.activation_peak_bytes and low.saved_bytes < high.saved_bytes
        ]
        ends = [downward.activation_peak_bytes.iloc[n] / MiB for n in (0, -1)]
        rows.append((model, region, *ends, lowest.budget, lowest.activation_peak_bytes / MiB, "; ".join(rising) or "-"))
    names = ["peak at the highest", "peak at the lowest budget", "budget of the lowest peak", "lowest peak"]
    return pd.DataFrame(rows, columns=["model", "compiled", *names, "less saved and a higher peak"])


def plot_peaks(table: pd.DataFrame, ax: Axes) -> None:
    """Saved bytes (dashed) and the peak (solid) in MiB against the budget, a colour for each region, of one model."""
    for colour, region in zip(("#0072B2", "#D55E00"), REGIONS, strict=True):
        rows = table[table.compiled == region].sort_values("budget")
        ax.plot(rows.budget, rows.activation_peak_bytes / MiB, color=colour, marker="o", label=f"peak, by {region}")
        ax.plot(rows.budget, rows.saved_bytes / MiB, "--", color=colour, marker=".", label=f"saved, by {region}")
    for method, style in (("lora", ":"), ("lora+checkpoint", "-.")):
        peak = table[table.compiled == method].activation_peak_bytes.iloc[0] / MiB
        ax.axhline(peak, color="#777777", linestyle=style, linewidth=1, label=f"peak of {method}, uncompiled")
    ax.set(xlabel="activation_memory_budget", ylabel="MiB (counted)", ylim=(0, None), title=table.model.iloc[0])
    ax.legend(fontsize=7)


def summary(table: pd.DataFrame, shape: tuple[int, int]) -> str:
    """The tables in Markdown."""
    shown = table.assign(saved=table.saved_bytes / MiB, peak=table.activation_peak_bytes / MiB)
    shown["budget"] = shown.budget.map(lambda budget: "-" if pd.isna(budget) else f"{budget:g}")
    by_budget = shown[["model", "compiled", "budget", "saved", "peak"]]
    return (
        f"## LoRA, fp32, {shape[0]} × {shape[1]} tokens; MiB, counted\n\n{_markdown(by_budget)}\n\n"
        f"## Where a lower budget saves less and peaks higher\n\n{_markdown(rises(table))}\n"
    )


def _markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * len(frame.columns)]
    rows += [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Count, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--shape", type=int, nargs=2, default=(2, 256), metavar=("BATCH", "TOKENS"))
    options = parser.parse_args(arguments)
    shape, begin = (options.shape[0], options.shape[1]), time.perf_counter()
    try:
        made(options.out)  # before the work
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    inductor, compiled.BACKEND = compiled.BACKEND, "aot_eager_decomp_partition"
    try:
        table = table_of({name: MODELS[name] for name in options.models}, tuple(options.budgets), shape)
    finally:
        compiled.BACKEND = inductor
    table.to_csv(options.out / "table.csv", index=False)
    figure = Figure(figsize=(5 * len(options.models), 4.5), layout="constrained")
    for name, ax in zip(options.models, figure.subplots(1, len(options.models), squeeze=False)[0], strict=True):
        plot_peaks(table[table.model == name], ax)
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        figure.savefig(options.out / f"peaks.{suffix}", metadata=metadata)
    (options.out / "summary.md").write_text(summary(table, shape), encoding="utf-8")
    told = environment(gpus.read(), describe()) | {"seconds": round(time.perf_counter() - begin)}
    (options.out / "environment.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(summary(table, shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
