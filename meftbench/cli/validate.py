"""`meftbench validate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from meftbench.cli.options import AllowCode, AsJson, Quiet, RunFolder, progress


def validate(
    run: RunFolder,
    profile: Annotated[
        str | None, typer.Option(help="A name of `meftbench list profiles`, or a file. Default: that of RUN's device.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep it in RUN, where `meftbench report` shows it.")] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """How far predictions are from what RUN measured on a GPU.

    Predicts the same cells, one after the other, with RUN's allocator and memory limit, and prints the errors of peak
    memory by method, precision and attention. Exits 5 where nothing measured has a prediction.
    """
    from meftbench.catalogue.profiles import find_profile
    from meftbench.errors import NOTHING_MATCHED, UserError
    from meftbench.records.store import load_run, warn_if_torn
    from meftbench.report.validation import validation_text
    from meftbench.verdicts import validation

    loaded = load_run(run)
    warn_if_torn(loaded)
    validation.measured_records(loaded)  # raises an error first where nothing was measured, whatever the profile
    if profile:
        find_profile(profile, "--profile")
    else:
        profile = validation.profile_of(loaded).name
    tell = progress(quiet)
    result = validation.validate(loaded, profile, tell, allow_code=allow_code)
    if not result.errors:
        what = f"no cell has a prediction ({'; '.join(result.missing)})"
        raise UserError(str(run), what, "measure others", NOTHING_MATCHED)
    if save:
        tell(f"{validation.save(loaded, result)}: written; `meftbench report {run}` shows it")
    print(json.dumps(validation.as_json(result), ensure_ascii=False) if as_json else validation_text(result))
