"""Memory that others measured and published, beside what is predicted for the same cells.

    python reports/campaigns/published.py reports/published

Reads figures.yaml of reports/published (or --figures) and predicts each figure on its device (meftbench.prediction):
the same quantity, from one trace a cell; and the operators of published_operators.py and losses of published_losses.py.
Writes table.csv, statistics.csv
and table.md, which is also printed and ends with reading.md, if OUT has one: what we make of the differences. With
--summary it also writes what the package carries of it (meftbench/catalogue/validated.yaml).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import published_losses
import published_operators
import published_traces
import torch
import transformers
import yaml
from torch.utils._python_dispatch import _get_current_dispatch_mode

from meftbench.catalogue.profiles import PREDICTED, find_profile
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import FOLDER
from meftbench.plan.point import cell_of
from meftbench.prediction import tracer as tracer_module
from meftbench.prediction.allocator import AllocatorSettings, replay
from meftbench.prediction.cuda_counter import WORKSPACE
from meftbench.prediction.predict import Predicted, predict
from meftbench.prediction.trace import uncomputed_step
from meftbench.prediction.tracer import Tracer
from meftbench.records.store import made, write_whole
from meftbench.strict_yaml import read
from meftbench.verdicts.published import COLUMNS, statistics

FIGURES = Path(__file__).resolve().parents[1] / "published" / "figures.yaml"
ELSEWHERE = "a100-80gb"  # where a source names no device: peaks hardly depend on it


@dataclass
class Held:
    """A prediction; the bytes above the level before it when the model without its head has run forward; and what is
    reserved within the card's memory, or without a limit where that does not suffice."""

    found: Predicted
    headless: int
    reserved: int


def figures_of(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of figures.yaml, each with what its group says."""
    for group in content["groups"]:
        shared = {name: value for name, value in group.items() if name != "figures"}
        for figure in group["figures"]:
            whole = shared | figure | {"cell": shared.get("cell", {}) | figure["cell"]}
            whole["bytes"] = round(figure["value"] * figure.get("unit_bytes", 1))
            yield whole


def held(cell: Cell, versions: Versions) -> Held:
    """Raises UserError: the cell cannot be traced."""
    levels: list[int] = []

    def watched(cell: Cell, **how: Any) -> Any:
        step, mode = uncomputed_step(cell, **how)

        def level(*_: Any) -> None:
            counter: Any = _get_current_dispatch_mode()
            levels.append(counter.total - counter.live[WORKSPACE])  # which a process that has run a step holds already

        base = getattr(step.model, step.model.base_model_prefix, step.model)
        base.register_forward_hook(level)
        return step, mode

    profile = find_profile(cell.device.removeprefix(PREDICTED))
    tracer = Tracer(profile, versions, extrapolate=False)  # the level is that of a step of all layers
    with mock.patch.object(tracer_module, "uncomputed_step", watched):
        # Without a limit: a cell that fills its card is to be compared nevertheless.
        found = predict(cell, profile, tracer=tracer, versions=versions, settings=AllocatorSettings())
    capacity = profile.memory_bytes - profile.context_bytes
    within = replay(found.events, AllocatorSettings(capacity=capacity))
    # The first step is the one that is traced; those after it follow from its events.
    # A model whose base is called in another way than by its forward hook has no such level.
    headless = levels[-1] - found.warm[0].baseline if levels else 0
    return Held(found, headless, (found.replayed if within.oom else within).reserved_peak)


def quantity_of(row: dict[str, Any], prediction: Held, before: Held | None) -> int:
    """The bytes that `row` measured, as predicted. before: the prediction of its cell at `from_batch_size`."""
    found = prediction.found
    extra = row.get("extra", {}).get("bytes", 0)
    match row["quantity"]:
        case "peak_allocated":
            return found.peak + extra
        case "held_after_forward":
            return prediction.headless + extra
        case "allocated_after_step":
            gradients = found.sizes["adapter_file_bytes"].value if row.get("gradients_alive") else 0
            return found.replayed.steps[-1].baseline.allocated + int(gradients or 0) + extra
        case "reserved":
            return prediction.reserved + extra
        case "growth":
            assert before is not None
            samples = row["cell"]["batch_size"] - row["from_batch_size"]
            return round((prediction.reserved - before.reserved) / samples) + extra
        case _:
            return prediction.reserved + row.get("context_bytes", found.profile.context_bytes) + extra


class Predictions:
    """Predicts each cell once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Versions], Held | str] = {}

    def of(self, row: dict[str, Any], **change: Any) -> Held | str:
        """The prediction of a figure's cell; or why there is none."""
        device = row["cell"].get("device", PREDICTED + ELSEWHERE)
        versions = Versions.parse(row.get("versions", ""))
        try:
            cell = cell_of(row["id"], row["cell"] | {"device": device} | change)
        except UserError as error:
            return error.what
        key = (cell.cell_id, versions)
        if key not in self._known:
            print(f"{row['id']} ...", file=sys.stderr, flush=True)
            try:
                self._known[key] = held(cell, versions)
            except UserError as error:
                self._known[key] = error.what
        return self._known[key]


def compared(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a figure, complete settings first; without a prediction its notes begin with the reason."""
    predictions, table = Predictions(), []
    for row in sorted(rows, key=lambda row: row["setting"] != "complete"):
        prediction = predictions.of(row)
        before = predictions.of(row, batch_size=row["from_batch_size"]) if "from_batch_size" in row else None
        refused = next((each for each in (prediction, before) if isinstance(each, str)), None)
        predicted = None
        notes = " ".join(row["notes"].split())
        if refused is None:
            assert isinstance(prediction, Held)
            predicted = quantity_of(row, prediction, before if isinstance(before, Held) else None)
            trained = prediction.found.sizes["parameters_trainable"].value
            if row.get("trained", trained) != trained:
                row["setting"], predicted = "partial", None
                refused = f"{trained:,} weights are trained here and {row['trained']:,} there"
        if extra := row.get("extra"):
            notes += f" Added: {extra['bytes']:,} bytes ({' '.join(extra['why'].split())})."
        table.append(
            {
                "id": row["id"],
                "setting": row["setting"],
                "quantity": row["quantity"],
                "published_bytes": row["bytes"],
                "predicted_bytes": predicted,
                "ratio": predicted and predicted / row["bytes"],
                "profile": row["cell"].get("device", PREDICTED + ELSEWHERE).removeprefix(PREDICTED),
                "rules": str(Versions.parse(row.get("versions", ""))),
                "source": row["source"],
                "notes": (f"Not predicted: {refused}. " if refused else "") + notes,
            }
        )
    return pd.DataFrame(table, columns=COLUMNS).astype({"predicted_bytes": "Int64", "ratio": float})


def operators() -> pd.DataFrame:
    """The rows of published_operators.py in the form of the table."""
    rows = [
        {
            "id": f"{row['operator']}-{row['mode']}-{row['size_name']}{row['size']}-{row['profile']}",
            "setting": "complete",
            "quantity": "operator_peak",
            "published_bytes": row["measured_bytes"],
            "predicted_bytes": row["predicted_bytes"],
            "ratio": row["predicted_bytes"] / row["measured_bytes"],
            "profile": row["profile"],
            "rules": str(Versions.parse("")),
            "source": "liger",
            "notes": f"{row['operator']}, {row['mode']}, on {row['device']}: one operator, median of ten iterations.",
        }
        for row in published_operators.predicted_operators()
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"predicted_bytes": "Int64", "ratio": float})


def losses() -> pd.DataFrame:
    """The rows of published_losses.py in the form of the table."""
    rows = [
        {
            "id": row["id"],
            "setting": "complete",
            "quantity": "loss_peak",
            "published_bytes": row["measured_bytes"],
            "predicted_bytes": row["predicted_bytes"],
            "ratio": row["predicted_bytes"] / row["measured_bytes"],
            "profile": row["profile"],
            "rules": row["rules"],
            "source": row["source"],
            "notes": "A head in bfloat16 and its loss, forward and backward; gradients of the one before are alive.",
        }
        for row in published_losses.predicted_losses()
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"predicted_bytes": "Int64", "ratio": float})


LIGER = {
    "title": "Liger-Kernel, benchmark/data/all_benchmark_data.csv",
    "where": "metric memory; kernel_provider huggingface or torch, and liger of fused_linear_cross_entropy",
    "url": "https://github.com/linkedin/Liger-Kernel/blob/ead96b618e5c/benchmark/data/all_benchmark_data.csv",
    "licence": "BSD-2-Clause",
    "read": "the file at that commit, and the scripts that wrote it (tests/groundtruth/data/README-operators.md)",
}


def markdown(frame: pd.DataFrame, sources: dict[str, Any]) -> str:
    """MiB, and what is not known once for the rows that share it."""
    head = ["id", "setting", "quantity", "published", "predicted", "difference", "ratio", "profile", "source", "note"]
    notes = {note: number for number, note in enumerate(dict.fromkeys(frame.notes), start=1)}
    lines = [head, ["---"] * len(head)]
    for row in frame.itertuples():
        numbers = ["-"] * 3
        if not pd.isna(row.predicted_bytes):
            difference = row.predicted_bytes - row.published_bytes
            numbers = [f"{row.predicted_bytes / 2**20:,.1f}", f"{difference / 2**20:+,.1f}", f"{row.ratio:.4f}"]
        measured = f"{row.published_bytes / 2**20:,.1f}"
        source = f"[{row.source}]({sources[row.source]['url']})"
        note = str(notes[row.notes])
        lines.append([row.id, row.setting, row.quantity, measured, *numbers, row.profile, source, note])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"{number}. {note}" for note, number in notes.items()) + "\n"


def summary(frame: pd.DataFrame) -> str:
    """What meftbench/catalogue/validated.yaml holds: errors by source, quantity, setting, rules and card, rounded."""
    predicted = frame[frame.ratio.notna()]
    keys = ["source", "quantity", "setting", "rules", "profile"]
    groups = [
        dict(zip(keys, name, strict=True)) | {"errors": [round(float(ratio) - 1, 6) for ratio in group.ratio]}
        for name, group in predicted.groupby(keys, sort=True)
    ]
    traces = published_traces.replayed_traces()
    content = {"schema": 1, "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    content |= {"traces": len(traces), "allocations": int(traces.allocations.sum())}
    content |= {"equal_addresses": int(traces.equal_addresses.sum()), "groups": groups}
    head = "# Written by: python reports/campaigns/published.py reports/published --summary\n"
    return head + yaml.safe_dump(content, sort_keys=False, width=118)


def main(arguments: list[str] | None = None) -> int:
    """Predict, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--only", nargs="+", metavar="ID", help="these rows")
    parser.add_argument("--no-operators", action="store_true", help="leave the single operators and losses out")
    parser.add_argument("--summary", action="store_true", help="write meftbench/catalogue/validated.yaml, too")
    options = parser.parse_args(arguments)
    try:
        made(options.out)  # before the work
        os.environ[FOLDER] = str(Path(__file__).parent)  # masked_lm.py
        content = read(options.figures).content
        rows = [row for row in figures_of(content) if not options.only or row["id"] in options.only]
        frame = compared(rows)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not options.only and not options.no_operators:
        complete = frame.setting == "complete"
        frame = pd.concat([frame[complete], operators(), losses(), frame[~complete]])
    frame.to_csv(options.out / "table.csv", index=False)
    spreads = statistics(frame)
    spreads.to_csv(options.out / "statistics.csv", index=False)
    text = (
        "# Published measurements beside predictions, in MiB (2^20 bytes)\n\n"
        f"{len(frame)} figures, {frame.ratio.notna().sum()} predicted, with torch {torch.__version__}. Ratio: predicted"
        f" by published. Where a source names no device, profile {ELSEWHERE} is taken. `device_used` is what is\n"
        "reserved and a context: the source's where it prints one, the profile's estimate elsewhere.\n\n"
        + markdown(frame, content["sources"] | {"liger": LIGER})
    )
    if (reading := options.out / "reading.md").is_file():
        text += "\n" + reading.read_text(encoding="utf-8")
    (options.out / "table.md").write_text(text, encoding="utf-8")
    if options.summary:
        from meftbench.catalogue.validated import FILE

        write_whole(FILE, summary(frame))
    print(spreads.to_string(index=False))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
