"""Memory that others measured and published, beside what is predicted for the same cells.

    python reports/campaigns/published.py reports/published

Reads figures.yaml of reports/published (or --figures) and predicts each row on its device (meftbench.prediction):
the same quantity, from one trace a cell. Writes table.csv and table.md, which is also printed and ends with reading.md,
if OUT has one: what we make of the differences. Rows whose setting is complete come first.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from meftbench.catalogue.profiles import PREDICTED, find_profile
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.point import cell_of
from meftbench.prediction import predict as predict_module
from meftbench.prediction.predict import Predicted, predict
from meftbench.prediction.trace import uncomputed_step
from meftbench.records.store import made
from meftbench.strict_yaml import read

FIGURES = Path(__file__).resolve().parents[1] / "published" / "figures.yaml"
COLUMNS = ["id", "setting", "quantity", "published_bytes", "predicted_bytes", "ratio", "profile", "source", "notes"]
ELSEWHERE = "a100-80gb"  # where a source names no device: peaks hardly depend on it
# What a source states and a cell cannot say.
WITHIN_STEPS = {"hf-perf", "hf-anatomy"}  # gradients are zeroed, not dropped, as torch before 2.0 did
BETWEEN_STEPS = {"peft-metamath"}  # gradients are dropped when the next step begins
CONTEXTS = dict.fromkeys(WITHIN_STEPS, 1343 * 2**20)  # printed there


@dataclass
class Held:
    """A prediction, and the bytes above the level before it when the model without its head has run forward."""

    found: Predicted
    headless: int


def held(cell: Cell, keeps_gradients: bool) -> Held:
    """Raises UserError: the cell cannot be traced."""
    levels: list[int] = []

    def watched(cell: Cell, **how: Any) -> Any:
        step, mode = uncomputed_step(cell, **how)

        def level(*_: Any) -> None:
            levels.append(_get_current_dispatch_mode().total)  # type: ignore[union-attr]

        base = getattr(step.model, step.model.base_model_prefix, step.model)
        base.register_forward_hook(level)
        if keeps_gradients:
            zero = step.optimizer.zero_grad
            step.optimizer.zero_grad = lambda set_to_none: zero(set_to_none=False)
        return step, mode

    profile = find_profile(cell.device.removeprefix(PREDICTED))
    with mock.patch.object(predict_module, "uncomputed_step", watched):
        found = predict(cell, profile)
    # The first step is the one that is traced; those after it follow from its events.
    return Held(found, levels[-1] - found.warm[0].baseline)


def quantity_of(row: dict[str, Any], prediction: Held) -> int:
    """The bytes that `row` measured, as predicted."""
    found, observed = prediction.found, prediction.found.measured[-1]
    match row["quantity"]:
        case "peak_allocated":
            return found.peak
        case "held_after_forward":
            return prediction.headless
        case "allocated_after_step":
            gradients = found.sizes["adapter_file_bytes"].value if row["source"] in BETWEEN_STEPS else 0
            return observed.baseline + int(gradients or 0)
        case "reserved":
            return found.replayed.reserved_peak
        case _:
            return found.replayed.reserved_peak + CONTEXTS.get(row["source"], found.profile.context_bytes)


def compared(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a figure, complete settings first; without a prediction its notes begin with the reason."""
    known: dict[tuple[str, bool], Held | str] = {}
    table = []
    for row in sorted(rows, key=lambda row: row["setting"] != "complete"):
        device = row["cell"].get("device", PREDICTED + ELSEWHERE)
        cell = cell_of(row["id"], row["cell"] | {"device": device})
        keeps = row["source"] in WITHIN_STEPS
        key = (cell.cell_id, keeps)
        notes = " ".join(row["notes"].split())
        if key not in known:
            print(f"{row['id']} ...", file=sys.stderr, flush=True)
            try:
                known[key] = held(cell, keeps)
            except UserError as error:
                known[key] = f"{error.what}. "
        prediction = known[key]
        predicted = None if isinstance(prediction, str) else quantity_of(row, prediction)
        table.append(
            {
                "id": row["id"],
                "setting": row["setting"],
                "quantity": row["quantity"],
                "published_bytes": round(row["bytes"]),
                "predicted_bytes": predicted,
                "ratio": predicted and predicted / row["bytes"],
                "profile": device.removeprefix(PREDICTED),
                "source": row["source"],
                "notes": (f"Not predicted: {prediction}" if isinstance(prediction, str) else "") + notes,
            }
        )
    return pd.DataFrame(table, columns=COLUMNS).astype({"predicted_bytes": "Int64", "ratio": float})


def markdown(frame: pd.DataFrame, sources: dict[str, Any]) -> str:
    """MiB, and what is not known once for the rows that share it."""
    head = ["id", "setting", "quantity", "published", "predicted", "difference", "ratio", "profile", "source", "note"]
    notes = {note: number for number, note in enumerate(dict.fromkeys(frame.notes), start=1)}
    lines = [head, ["---"] * len(head)]
    for row in frame.itertuples():
        numbers = ["-"] * 3
        if not pd.isna(row.predicted_bytes):
            difference = row.predicted_bytes - row.published_bytes
            numbers = [f"{row.predicted_bytes / 2**20:,.1f}", f"{difference / 2**20:+,.1f}", f"{row.ratio:.3f}"]
        measured = f"{row.published_bytes / 2**20:,.1f}"
        source = f"[{row.source}]({sources[row.source]['url']})"
        note = str(notes[row.notes])
        lines.append([row.id, row.setting, row.quantity, measured, *numbers, row.profile, source, note])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"{number}. {note}" for note, number in notes.items()) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Predict, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--only", nargs="+", metavar="ID", help="these rows")
    options = parser.parse_args(arguments)
    try:
        made(options.out)  # before the work
        content = read(options.figures).content
        frame = compared([row for row in content["figures"] if not options.only or row["id"] in options.only])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    frame.to_csv(options.out / "table.csv", index=False)
    text = (
        "# Published measurements beside predictions, in MiB (2^20 bytes)\n\n"
        f"{len(frame)} figures, {frame.ratio.notna().sum()} predicted, with torch {torch.__version__}. Ratio: predicted"
        f" by published. Where a source names no device, profile {ELSEWHERE} is taken. `device_used` is what is\n"
        "reserved and a context: the source's where it prints one, the profile's estimate elsewhere.\n\n"
        + markdown(frame, content["sources"])
    )
    if (reading := options.out / "reading.md").is_file():
        text += "\n" + reading.read_text(encoding="utf-8")
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
