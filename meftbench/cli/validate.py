"""`meftbench validate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from meftbench.cli.options import RunFolder


def validate(
    run: RunFolder,
    profile: Annotated[
        str | None, typer.Option(help="A name of `meftbench list profiles`, or a file. Default: that of RUN's device.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """How far predictions are from what RUN measured on a GPU.

    Predicts the same cells, one after the other, and prints the errors of peak memory by method, precision and
    attention. Exits 5 where nothing measured has a prediction.
    """
    import sys
    import tempfile
    from pathlib import Path

    from meftbench.errors import NOTHING_MATCHED, UserError
    from meftbench.plan.profiles import find_profile
    from meftbench.plan.protocol import Protocol
    from meftbench.plan.suite import Suite
    from meftbench.records.store import load_run, warn_if_torn
    from meftbench.runner import run_suite
    from meftbench.verdicts import validation

    loaded = load_run(run)
    warn_if_torn(loaded)
    measured = validation.measured_records(loaded)
    if profile:
        find_profile(profile, "--profile")
    else:
        profile = validation.profile_of(loaded).name
    cells = {cell.cell_id: cell for cell in (validation.predicted_cell(record, profile) for record in measured)}
    protocol = Protocol(warmup=1, steps=1, repeats=1, passes=("memory",), on_oom="record")
    if not quiet:
        print(f"predicting {len(cells)} cell{'s' * (len(cells) != 1)} on {profile}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite("validate", "", protocol, tuple(cells.values()), None)
        predicted = {record.cell_id: record for record in run_suite(suite, Path(folder) / "run").records}
    missing = validation.without(measured, predicted, profile)
    found = validation.errors(measured, predicted, profile)
    if not found:
        raise UserError(str(run), f"no cell has a prediction ({'; '.join(missing)})", "measure others", NOTHING_MATCHED)
    if as_json:
        print(json.dumps(validation.as_json(found, missing, profile), ensure_ascii=False))
    else:
        print(validation.text(found, missing))
