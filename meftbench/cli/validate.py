"""`meftbench validate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from meftbench.cli.options import AsJson, Quiet, RunFolder, progress


def validate(
    run: RunFolder,
    profile: Annotated[
        str | None, typer.Option(help="A name of `meftbench list profiles`, or a file. Default: that of RUN's device.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep it in RUN, where `meftbench report` shows it.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """How far predictions are from what RUN measured on a GPU.

    Predicts the same cells, one after the other, with RUN's allocator and memory limit, and prints the errors of peak
    memory by method, precision and attention. Exits 5 where nothing measured has a prediction.
    """
    import tempfile
    from pathlib import Path

    from meftbench.errors import NOTHING_MATCHED, UserError
    from meftbench.plan.profiles import find_profile
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
    tell = progress(quiet)
    tell(f"predicting {len(cells)} cell{'s' * (len(cells) != 1)} on {profile}")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite("validate", "", validation.protocol_for(loaded), tuple(cells.values()), None)
        predicted = {record.cell_id: record for record in run_suite(suite, Path(folder) / "run").records}
    missing = validation.without(measured, predicted, profile)
    found = validation.Validation(profile, validation.errors(measured, predicted, profile), missing)
    if not found.errors:
        raise UserError(str(run), f"no cell has a prediction ({'; '.join(missing)})", "measure others", NOTHING_MATCHED)
    if save:
        tell(f"{validation.save(loaded, found)}: written; `meftbench report {run}` shows it")
    print(json.dumps(validation.as_json(found), ensure_ascii=False) if as_json else validation.text(found))
