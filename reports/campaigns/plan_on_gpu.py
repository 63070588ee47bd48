"""The first answers of `meftbench plan` for the card at hand, run on it: memory, step time, and the order of methods.

    python reports/campaigns/plan_on_gpu.py reports/plan-on-h100            # on a GPU, some minutes
    python reports/campaigns/plan_on_gpu.py OUT --planned-only              # without a GPU: what would be run

Calibrates the card (`meftbench doctor --calibrate`), plans MODEL for half of its memory with the methods of METHODS,
and measures each method's best row that fits, in a process of its own, for STEPS steps. Writes profile.yaml, plan.csv
(predicted and measured side by side) and summary.md, which is also printed. Exits 1 where memory is off by more than
3 %, a time of the three fastest by more than 15 %, or the order of methods differs where measured times differ by more
than 5 %; 4 without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from meftbench.errors import DONE, OVER_BUDGET, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.point import cell_of
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite
from meftbench.planned import plan_for
from meftbench.records.store import made, write_whole
from meftbench.report.render.verdicts import markdown_table
from meftbench.runner import run_suite
from meftbench.runner.calibrate import calibrate

MODEL, LENGTH = "llama-3.2-1b@random", 2048
METHODS = ("full", "lora", "parallel", "meft1-exact", "meft3-exact")
STEPS = 5
MEMORY, TIME, CLOSE = 0.03, 0.15, 0.05  # shares: the largest errors, and between which times no order is asked for
COLUMNS = ("method", "micro_batch_size", "predicted_bytes", "measured_bytes", "predicted_s", "measured_s", "note")


def planned(profile: str, memory: str | None) -> list[dict[str, Any]]:
    """Each method's best row that fits, the fastest first."""
    found = plan_for(MODEL, memory=memory, sequence_length=LENGTH, methods=METHODS, profile=profile, larger=[])
    return sorted(found.best, key=lambda row: -(row["tokens_per_s"] or 0.0))


def cell_for(row: dict[str, Any]) -> Cell:
    """The cell of a row, to be measured."""
    micro = row["micro_batch_size"]
    shape = {"batch_size": micro, "sequence_length": row["sequence_length"]}
    fields = {"model": {"name": MODEL}, "method": {"name": row["method"]}, "device": "cuda", **shape}
    return cell_of("plan_on_gpu", fields | {"precision": row["precision"], "optimizer": row["optimizer"]})


def measured(rows: list[dict[str, Any]], out: Path) -> list[list[Any]]:
    """A row of COLUMNS for each planned row."""
    cells = [cell_for(row) for row in rows]
    protocol = Protocol(warmup=2, steps=STEPS, passes=("memory", "throughput"), on_oom="record")
    run = run_suite(Suite("plan-on-gpu", "", protocol, tuple(cells), None), out / "run", resume=True)
    records = {record.cell_id: record for record in run.records}
    lines = []
    for row, cell in zip(rows, cells, strict=True):
        record = records[cell.cell_id]
        numbers = [record.value("peak_reserved_bytes"), record.value("step_s")] if record.status == "ok" else [None] * 2
        note = "" if record.status == "ok" else f"{record.status}: {record.status_detail.get('message', '')}"
        predicted = [row["method"], row["micro_batch_size"], row["peak_reserved_bytes"]]
        lines.append([*predicted, numbers[0], row["step_s"], numbers[1], note])
    return lines


def faults(table: pd.DataFrame) -> list[str]:
    """What is off by more than it may be."""
    found = [f"{row.method}: {row.note}" for row in table.itertuples() if row.note]
    done = table[table.note == ""]
    for place, row in enumerate(done.itertuples()):
        if abs(row.predicted_bytes / row.measured_bytes - 1) > MEMORY:
            found.append(f"{row.method}: memory is {row.predicted_bytes / row.measured_bytes - 1:+.1%} off")
        if place < 3 and abs(row.predicted_s / row.measured_s - 1) > TIME:
            found.append(f"{row.method}: time is {row.predicted_s / row.measured_s - 1:+.1%} off")
    per_sample = done.assign(p=done.predicted_s / done.micro_batch_size, m=done.measured_s / done.micro_batch_size)
    for one, other in itertools.combinations(per_sample.itertuples(), 2):
        apart = abs(one.m - other.m) > CLOSE * max(one.m, other.m)
        if apart and (one.p < other.p) != (one.m < other.m):
            found.append(f"{one.method} and {other.method} are in the wrong order")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Plan, measure, compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--memory", help="that the plan may use, such as 40GiB (default: that of the card)")
    parser.add_argument("--planned-only", action="store_true", help="plan for an A100 by its data sheet; no GPU needed")
    options = parser.parse_args(arguments)
    try:
        made(options.out)
        if options.planned_only:
            lines = [
                [row["method"], row["micro_batch_size"], row["peak_reserved_bytes"], None, row["step_s"], None, ""]
                for row in planned("a100-80gb", options.memory)
            ]
        else:
            profile = options.out / "profile.yaml"
            calibrate(profile, "cuda", tell=lambda line: print(line, file=sys.stderr))
            lines = measured(planned(str(profile.absolute()), options.memory), options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    table = pd.DataFrame(lines, columns=list(COLUMNS))
    write_whole(options.out / "plan.csv", table.to_csv(index=False))
    wrong = [] if options.planned_only else faults(table)
    heading = f"# {MODEL} at {LENGTH:,} tokens: each method's best lever set, predicted and measured\n\n"
    body = [["-" if pd.isna(value) else str(value) for value in line] for line in table.values.tolist()]
    text = heading + markdown_table(list(COLUMNS), body) + "\n" + "".join(f"\n- {line}" for line in wrong)
    write_whole(options.out / "summary.md", text)
    print(text)
    return OVER_BUDGET if wrong else DONE


if __name__ == "__main__":
    sys.exit(main())
