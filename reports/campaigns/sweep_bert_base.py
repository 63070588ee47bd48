"""BERT-base on a GPU: `sweep-bert-base` in fp32 and under bf16 autocast, and the count held against the allocator.

    python reports/campaigns/sweep_bert_base.py reports/h200-bert-base

writes into that folder a run for each precision (records, environment, page), a run of the same cells counted on the
CPU, and `counted-against-measured.csv` with a line of its error on the terminal. It may be interrupted and called
again: what has ended is not repeated. Without a GPU it says so and ends with exit code 4; `--suite` and `--device
counted` run it in miniature, which is how tests/test_campaigns.py holds it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from meftbench.errors import UserError
from meftbench.plan.suite import Suite, load_suite
from meftbench.records.store import Run
from meftbench.report.render.report import write_report
from meftbench.runner import Ended, Event, run_suite

PRECISIONS = ("fp32", "bf16-autocast")
COMPARED = ("activation_peak_bytes", "saved_bytes", "peak_allocated_bytes")


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--suite", default="sweep-bert-base")
    parser.add_argument("--device", default="cuda", choices=["cuda", "counted"])
    parser.add_argument("--limit", type=int, help="cells started for each precision in this call")
    parser.add_argument("--counted-tokens", type=int, default=2048, help="largest batch x length counted on the CPU")
    options = parser.parse_args(arguments)
    try:
        suite = load_suite(options.suite)
        measured = [_run(suite, precision, options) for precision in PRECISIONS]
        counted = _count(suite, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    table = counted_against_measured(counted, measured[0])
    table.to_csv(options.out / "counted-against-measured.csv", index=False)
    print(summary(table))
    return 0


def _run(suite: Suite, precision: str, options: argparse.Namespace) -> Run:
    cells = tuple(cell.model_copy(update={"precision": precision}) for cell in suite.on(options.device).cells)
    named = replace(suite, name=f"{suite.name}-{precision}", cells=cells)
    folder = options.out / precision
    run = run_suite(named, folder, resume=True, limit=options.limit, on_event=_tell)
    write_report([run], folder, {"html", "csv"})
    return run


def _count(suite: Suite, options: argparse.Namespace) -> Run:
    """The fp32 cells that a CPU can do in reasonable time, counted."""
    cells = tuple(c for c in suite.on("counted").cells if c.batch_size * c.sequence_length <= options.counted_tokens)
    if not cells:
        raise UserError("--counted-tokens", "no cell is that small", "raise it")
    protocol = suite.protocol.model_copy(update={"passes": ("memory",), "warmup": 1, "steps": 1})
    small = replace(suite, name=f"{suite.name}-counted", cells=cells, protocol=protocol)
    return run_suite(small, options.out / "counted", resume=True, on_event=_tell)


def _tell(event: Event) -> None:
    if isinstance(event, Ended):
        record = event.record
        print(f"[{event.done}/{event.total}] {record.status} {record.label} {record.wall_s:.1f} s", file=sys.stderr)


def counted_against_measured(counted: Run, measured: Run) -> pd.DataFrame:
    """One row a cell and metric that both runs have: bytes counted, bytes measured, counted / measured."""
    by_label = {record.label: record for record in measured.records if record.status == "ok"}
    rows = []
    for record in counted.records:
        other = by_label.get(record.label)
        if record.status != "ok" or other is None:
            continue
        for metric in COMPARED:
            ours, theirs = record.value(metric), other.value(metric)
            if isinstance(ours, int) and isinstance(theirs, int) and theirs:
                source = other.metrics[metric].source
                rows.append((record.label, metric, ours, theirs, source, ours / theirs))
    return pd.DataFrame(rows, columns=["cell", "metric", "counted_bytes", "other_bytes", "other_source", "ratio"])


def summary(table: pd.DataFrame) -> str:
    """A line a metric: how far the count is from the other run, median and worst."""
    lines = []
    for metric, rows in table.groupby("metric"):
        error = (rows["ratio"] - 1).abs()
        worst = rows.loc[error.idxmax(), "cell"]
        lines.append(
            f"{metric}: counted against {rows['other_source'].iloc[0]}, {len(rows)} cells: "
            f"median error {error.median():.2%}, worst {error.max():.2%} ({worst})"
        )
    return "\n".join(lines) or "no cell was run in both ways"


if __name__ == "__main__":
    sys.exit(main())
