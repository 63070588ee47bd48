"""Predicted step times against measured ones on this CPU, and against published throughputs of GPUs.

    python reports/campaigns/step_time.py reports/step-time            # ten minutes on one core

The CPU is calibrated as `meftbench doctor --calibrate` does it. Then the step of every method is predicted, and
measured: each in a process of its own, on real weights (MiniLM, SmolLM2), a step of each in turn, so that what else the
machine does falls on all alike. Medians are compared: the time of a step, and its ratio to that of `lora+checkpoint`.
The published throughputs of published.csv are predicted from data sheets. Writes profile.yaml, steps.csv,
published-predicted.csv and summary.md, which is also printed. Exits 1 where a ratio is off by more than 10 %, or two
methods whose measured times differ by more than that are predicted in the other order.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

from meftbench.catalogue.profiles import CpuProfile, find_device, find_profile
from meftbench.catalogue.speeds import Speeds
from meftbench.errors import DONE, OVER_BUDGET
from meftbench.measuring.build import build_step
from meftbench.plan.cell import Cell
from meftbench.plan.factories import FOLDER
from meftbench.prediction.on_cpu import trace_on_cpu
from meftbench.prediction.predict import predict
from meftbench.prediction.seconds import StepTime, step_time
from meftbench.records.store import made, write_whole
from meftbench.report.render.verdicts import markdown_table
from meftbench.runner.calibrate import calibrate

REFERENCE = "lora+checkpoint"
LIMIT = 0.10
_OF_PUBLISHED = (
    "Samples a second, of BERT-base with masked language modelling and Adam. Speeds are those of data sheets, with "
    "assumed efficiencies: nothing was calibrated on these cards. The published loop also makes its data, and waits "
    "for the loss at each step, which is not predicted; cards that lower their clock under load are slower than their "
    "sheet."
)
_MEFTS = ("meft1", "meft2", "meft3", "meft1-exact", "meft2-exact", "meft3-exact", "bdia", "midpoint")


@dataclass(frozen=True)
class Setting:
    """A model with a shape, the methods that are tried on it, and how many steps of each are timed."""

    model: str
    fields: dict[str, Any]
    methods: tuple[str, ...]
    steps: int


SETTINGS = (
    Setting(
        "minilm",
        {"batch_size": 8, "sequence_length": 128, "head": "classification"},
        (
            *(REFERENCE, "full", "full+checkpoint", "lora", "lora+tiled_mlp", "lora-fa", "parallel", "houlsby"),
            *("pfeiffer", "mezo", *_MEFTS),
        ),
        9,
    ),
    Setting(
        "smollm2",
        {"batch_size": 2, "sequence_length": 128, "head": "causal_lm"},
        (
            *(REFERENCE, "lora", "lora+chunked_loss", "lora+checkpoint+chunked_loss", "lora+tiled_mlp", "houlsby"),
            *("mezo", "meft1", "meft1-exact", "bdia"),
        ),
        5,
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--profile", type=Path, help="of this CPU, instead of calibrating")
    options = parser.parse_args(arguments)
    made(options.out)
    torch.set_num_threads(options.threads)
    file = options.profile or options.out / "profile.yaml"
    if options.profile is None:
        calibrate(file, "cpu", options.threads, _tell)
    profile = find_device(str(file.absolute()))
    assert isinstance(profile, CpuProfile)
    table = pd.DataFrame([row for setting in SETTINGS for row in _rows(setting, profile.speeds, options.threads)])
    table.to_csv(options.out / "steps.csv", index=False)
    published = pd.DataFrame(published_rows(options.out / "published.csv"))
    published.to_csv(options.out / "published-predicted.csv", index=False)
    faults = faults_of(table)
    summary = _summary(table, published, profile, faults)
    write_whole(options.out / "summary.md", summary)
    print(summary)
    return OVER_BUDGET if faults else DONE


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- this CPU ---


def _rows(setting: Setting, speeds: Speeds, threads: int) -> list[dict[str, Any]]:
    """A row for each method: predicted and measured seconds of a step, and where the predicted ones go."""
    cells = {name: Cell.of(name, model=setting.model, **setting.fields) for name in setting.methods}
    predicted: dict[str, StepTime] = {}
    for name, cell in cells.items():
        _tell(f"predicting {cell.label}")
        predicted[name] = step_time(trace_on_cpu(cell).work, speeds)
    measured = _measured(cells, setting.steps, threads)
    rows = []
    for name in cells:
        ours, times = predicted[name], measured[name]
        ratios = ours.step_s / predicted[REFERENCE].step_s, median(times) / median(measured[REFERENCE])
        rows.append(
            {"model": setting.model, "method": name, "predicted_s": ours.step_s, "measured_s": median(times)}
            | {"least_s": min(times), "most_s": max(times), "error": ours.step_s / median(times) - 1}
            | {"predicted_ratio": ratios[0], "measured_ratio": ratios[1], "ratio_error": ratios[0] / ratios[1] - 1}
            | {f"{part}_s": seconds for part, seconds in ours.parts.items()}
            | {"recomputed_s": ours.recomputed_s}
        )
    return rows


def _measured(cells: dict[str, Cell], steps: int, threads: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each cell, in turn, after two that are not timed."""
    context = multiprocessing.get_context("fork")
    ends: dict[str, Connection] = {}
    processes = []
    for name, cell in cells.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(cell, threads, theirs), daemon=True)
        process.start()
        theirs.close()
        ends[name] = ours
        processes.append(process)
        ours.recv()  # one after the other, as each builds its model
    times: dict[str, list[float]] = {name: [] for name in cells}
    for number in range(steps):
        _tell(f"measuring step {number + 1} of {steps} of {len(cells)} methods")
        for name, end in ends.items():
            end.send(True)
            times[name].append(end.recv())
    for end in ends.values():
        end.send(False)
    for process in processes:
        process.join()
    return times


def _serve(cell: Cell, threads: int, end: Connection) -> None:
    torch.set_num_threads(threads)
    step = build_step(cell, torch.device("cpu"))
    for _ in range(2):
        step.run()
    end.send(0.0)
    while end.recv():
        begin = time.perf_counter()
        step.run()
        end.send(time.perf_counter() - begin)


def faults_of(table: pd.DataFrame) -> list[str]:
    """A line for each ratio that is off by more than `LIMIT`, and for each pair of methods in the wrong order."""
    faults = [
        f"{row.model} {row.method}: ratio off by {row.ratio_error:+.1%}"
        for row in table.itertuples()
        if abs(row.ratio_error) > LIMIT
    ]
    for _, rows in table.groupby("model", sort=False):
        for first, second in itertools.combinations(rows.itertuples(), 2):
            apart = abs(first.measured_s - second.measured_s) > LIMIT * min(first.measured_s, second.measured_s)
            if apart and (first.measured_s < second.measured_s) != (first.predicted_s < second.predicted_s):
                faults.append(f"{first.model}: {first.method} and {second.method} in the wrong order")
    return faults


# --- published throughputs ---


def published_rows(file: Path) -> list[dict[str, Any]]:
    """Each published throughput (samples a second) beside the one that the data sheet's speeds give."""
    os.environ[FOLDER] = str(Path(__file__).parent)  # masked_lm.py
    rows = []
    for row in pd.read_csv(file).itertuples():
        profile = find_profile(row.profile)
        cell = Cell.of(
            row.method,
            model=row.model,
            **{"batch": row.batch, "batch_size": row.batch_size, "sequence_length": row.sequence_length},
            **{"precision": row.precision, "optimizer": row.optimizer, "device": f"predicted:{row.profile}"},
        )
        assert profile.speeds is not None
        seconds = step_time(predict(cell, profile).work, profile.speeds).step_s
        ours = row.batch_size / seconds
        rows.append(
            {"device": profile.device, "cell": cell.label, "published_samples_per_s": row.samples_per_s}
            | {"predicted_samples_per_s": round(ours, 1), "error": ours / row.samples_per_s - 1, "source": row.source}
        )
    return rows


# --- the report ---


def _summary(table: pd.DataFrame, published: pd.DataFrame, profile: CpuProfile, faults: list[str]) -> str:
    errors, ratios = table.error.abs(), table.ratio_error.abs()[table.method != REFERENCE]
    parts = ["# Step times, predicted against measured", ""]
    parts += [f"{profile.device}, torch {torch.__version__}; medians of steps that were taken in turn.", ""]
    parts += [
        f"- ratio to `{REFERENCE}`: {len(ratios)} cells, median error {median(ratios):.1%}, worst {max(ratios):.1%}",
        f"- seconds of a step: {len(errors)} cells, median error {median(errors):.1%}, worst {max(errors):.1%}",
        *(f"- {fault}" for fault in faults or ["order of methods: right wherever two differ by more than 10 %"]),
    ]
    for (model,), rows in table.groupby(["model"], sort=False):
        fields = next(setting.fields for setting in SETTINGS if setting.model == model)
        shown = [
            (
                *(row.method, f"{row.predicted_s:.3f}", f"{row.measured_s:.3f}", f"{row.error:+.1%}"),
                *(f"{row.predicted_ratio:.3f}", f"{row.measured_ratio:.3f}", f"{row.ratio_error:+.1%}"),
            )
            for row in rows.sort_values("measured_s").itertuples()
        ]
        heads = ["method", "predicted, s", "measured, s", "error", "ratio, predicted", "ratio, measured", "error"]
        about = ", ".join(f"{name} {value}" for name, value in fields.items())
        parts += ["", f"## {model}, {about}", "", markdown_table(heads, shown)]
    shown = [
        (
            *(row.device, row.cell, f"{row.published_samples_per_s:g}", f"{row.predicted_samples_per_s:g}"),
            *(f"{row.error:+.0%}", row.source),
        )
        for row in published.itertuples()
    ]
    parts += ["", "## Published throughputs, predicted from data sheets", "", _OF_PUBLISHED, ""]
    parts.append(markdown_table(["device", "cell", "published", "predicted", "error", "source"], shown))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
