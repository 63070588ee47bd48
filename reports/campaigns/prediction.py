"""Predictions held against a GPU: `sweep-prediction` measured, the same cells predicted, and how far apart they are.

    python reports/campaigns/prediction.py reports/h200-prediction               # on a GPU, half an hour on an H200
    python reports/campaigns/prediction.py reports/h200-prediction --measured runs/theirs   # measured elsewhere

writes into that folder the measured run (records, environment, page with the scatter), `validation.json`, `errors.csv`
with a row a cell and metric, and `summary.md` with the spreads by method, precision and attention against the limits of
issue 5. It may be interrupted and called again: what was measured is not repeated. tests/test_repredicted.py predicts
what is committed below reports/ again, so that no later change of a rule goes unseen.

Exits 1 where a limit is exceeded, 4 without a GPU; 5 where nothing was measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import pandas as pd

from meftbench.errors import DONE, OVER_BUDGET, UserError
from meftbench.plan.suite import load_suite
from meftbench.records.store import Run, load_run, made
from meftbench.report.render.report import write_report
from meftbench.report.views.validation import validation_text
from meftbench.runner import Ended, Event, run_suite
from meftbench.verdicts import validation

# Of each metric: the median and the worst error without its sign, as shares (issue 5, "With a GPU").
LIMITS = {"peak_allocated_bytes": (0.01, 0.03), "peak_reserved_bytes": (0.05, 0.05)}


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--suite", default="sweep-prediction")
    parser.add_argument("--measured", type=Path, help="a measured run, instead of measuring")
    parser.add_argument("--profile", help="default: that of the device")
    parser.add_argument("--limit", type=int, help="cells measured in this call")
    options = parser.parse_args(arguments)
    try:
        run = _copied(options.measured, options.out) if options.measured else _measured(options)
        validation.measured_records(run)
        profile = options.profile or validation.profile_of(run).name
        found = validation.validate(run, profile, _tell_line)
        validation.save(run, found)
        frame = pd.DataFrame([vars(error) | {"error": error.share} for error in found.errors])
        frame.to_csv(options.out / "errors.csv", index=False)
        exceeded = beyond(found)
        (options.out / "summary.md").write_text(summary(run, found, exceeded), encoding="utf-8")
        write_report([run], options.out, {"html", "csv"})
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    return OVER_BUDGET if exceeded else DONE


def _measured(options: argparse.Namespace) -> Run:
    suite = load_suite(options.suite).on("cuda")
    return run_suite(suite, options.out, resume=True, limit=options.limit, on_event=_tell)


def _copied(source: Path, out: Path) -> Run:
    """The files of a run that make it one, in `out`."""
    run = load_run(source)
    if made(out).resolve() != source.resolve():
        for name in ("suite.yaml", "environment.json", "records.jsonl"):
            shutil.copyfile(run.path / name, out / name)
    return load_run(out)


def _tell(event: Event) -> None:
    if isinstance(event, Ended):
        record = event.record
        _tell_line(f"[{event.done}/{event.total}] {record.status} {record.label} {record.wall_s:.1f} s")


def _tell_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def beyond(found: validation.Validation) -> list[str]:
    """A line for each limit that is exceeded."""
    lines = []
    for row in validation.spreads(found.errors):
        if row.axis == "all" and row.metric in LIMITS:
            for name, value, limit in zip(
                ("median", "worst"), (row.median, row.worst), LIMITS[row.metric], strict=True
            ):
                if value > limit:
                    lines.append(f"{row.metric}: {name} {value:.2%} is over {limit:.0%}")
    return lines


def summary(run: Run, found: validation.Validation, exceeded: list[str]) -> str:
    """The spreads as printed, which limits are exceeded, and how the measuring ended."""
    ended = pd.Series([record.status for record in run.records]).value_counts()
    said = ", ".join(f"{count} {status}" for status, count in ended.items())
    held = "\n".join(f"- {line}" for line in exceeded) or "- all limits are held"
    head = f"# Predictions against measurements, by the rules of {found.profile}\n\nMeasured: {said} of {run.name}."
    return f"{head}\n\n{held}\n\n```\n{validation_text(found)}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
