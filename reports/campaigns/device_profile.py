"""A device profile from a card at hand: a spread of cells measured, predicted, and tried with the prediction as limit.

    python reports/campaigns/device_profile.py reports/h200-profile            # on a GPU, eight minutes at most
    python reports/campaigns/device_profile.py OUT --measured runs/theirs      # of a run that was measured elsewhere

Cells of the suite `device-profile` (methods x precisions x attention kernels x two shapes) are measured in a random
order that is always the same, as many as the time allows. The same cells are predicted by the profile of the card, or
by the one that --profile names. Then some run again with their predicted peak as the limit of their memory: none may
fail, none may leave more than 3 % of it unused. Writes OUT/measured (records, environment), errors.csv, limits.csv,
summary.md, and OUT/NAME.yaml: a profile with what was measured (memory, multiprocessors, context, workspace) and on how
many cells it was validated, which `--profile OUT/NAME.yaml` takes anywhere.

Exit codes: 0; 1 where an error or a limit is exceeded; 4 without a GPU; 5 where nothing was measured.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import yaml

from meftbench.catalogue.profiles import PROFILES, Profile, find_profile
from meftbench.errors import DONE, NOT_COMPARABLE, OVER_BUDGET, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.suite import load_suite
from meftbench.records.store import Run, load_run, made, write_whole
from meftbench.report.views.validation import validation_text
from meftbench.runner import run_suite
from meftbench.verdicts import validation
from meftbench.verdicts.limits import Limited, limited

# Of peak allocated memory: the median and the worst error without its sign, as shares.
LIMITS = (0.01, 0.03)
SHARES = (0.55, 0.25, 0.2)  # of the time, for measuring, predicting, and trying the limits


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--suite", default="device-profile")
    parser.add_argument("--measured", type=Path, help="a run that a GPU measured, instead of measuring")
    parser.add_argument("--profile", help="whose rules predict; default: that of the device")
    parser.add_argument("--seconds", type=float, default=460, help="for all of it (default: 460)")
    options = parser.parse_args(arguments)
    try:
        begin = time.monotonic()
        if not options.measured and not torch.cuda.is_available():
            raise UserError("device_profile", "no CUDA device is available", "name a run by --measured", NOT_COMPARABLE)
        made(options.out)
        if options.measured:
            run = load_run(options.measured)
        else:
            run = _measured(options, begin + SHARES[0] * options.seconds)
        measured = validation.measured_records(run)
        base = find_profile(options.profile) if options.profile else _of_device(run)
        until = begin + sum(SHARES[:2]) * options.seconds
        most = len(measured) if options.measured else max(1, int((until - time.monotonic()) / 8))
        found = validation.validate(run, options.profile or base.name, _tell, most)
        limits = [] if options.measured else _limits(run, found, begin + options.seconds)
        exceeded = _write(options.out, run, base, found, limits)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    return OVER_BUDGET if exceeded else DONE


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measured(options: argparse.Namespace, until: float) -> Run:
    """As many cells as the time allows, each begun in time, in an order of which every beginning is a spread."""
    suite = load_suite(options.suite).on("cuda")
    cells = list(suite.cells)
    random.Random(0).shuffle(cells)
    for cell in cells:
        if time.monotonic() > until:
            break
        chosen = partial(_same, cell)
        run = run_suite(suite, options.out / "measured", resume=True, where=chosen)
        _tell(f"{run.records[-1].status} {run.records[-1].label}")
    return load_run(options.out / "measured")


def _same(cell: Cell, other: Cell) -> bool:
    return cell.cell_id == other.cell_id


def _of_device(run: Run) -> Profile:
    """The shipped profile of the run's device; where there is none, that of an A100, under the device's own facts."""
    try:
        return validation.profile_of(run)
    except UserError:
        return find_profile("a100-80gb")


def _limits(run: Run, found: validation.Validation, until: float) -> list[Limited]:
    """Cells with their predicted reserved peak as limit, as many as the time allows at some ten seconds each."""
    predicted = {error.label: error.predicted for error in found.errors if error.metric == "peak_reserved_bytes"}
    chosen: list[tuple[Cell, int]] = []
    for record in run.records[: max(1, int((until - time.monotonic()) / 10))]:
        if record.status == "ok" and record.label in predicted:
            fields = {name: value for name, value in record.cell.items() if name in Cell.model_fields}
            fields |= {"model_config_overrides": record.cell.get("model_config") or {}}
            chosen.append((Cell.model_validate(fields), predicted[record.label]))
    return limited(chosen, validation.protocol_for(run), _tell)


def _write(out: Path, run: Run, base: Profile, found: validation.Validation, limits: list[Limited]) -> list[str]:
    """The files of the campaign; a line for each limit that is exceeded."""
    frame = pd.DataFrame([vars(error) | {"error": error.share} for error in found.errors])
    frame.to_csv(out / "errors.csv", index=False)
    table = [vars(each) | {"unused": each.unused, "held": each.held} for each in limits]
    pd.DataFrame(table, columns=["label", "limit", "status", "used", "unused", "held"]).to_csv(
        out / "limits.csv", index=False
    )
    sizes = [abs(error.share) for error in found.errors if error.metric == "peak_allocated_bytes"]
    exceeded = [
        f"peak_allocated_bytes: {name} error {value:.2%} is over {limit:.0%}"
        for name, value, limit in zip(("median", "worst"), (median(sizes), max(sizes)), LIMITS, strict=True)
        if value > limit
    ]
    exceeded += [f"{each.label}: {each.status}, {each.unused or 0:.1%} unused" for each in limits if not each.held]
    content = profile_content(run, base, sizes, verified=not exceeded)
    file = out / f"{content['name']}.yaml"
    write_whole(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=118))
    find_profile(str(file))  # what others are to read is read here first
    held = "\n".join(f"- {line}" for line in exceeded) or "- all limits are held"
    tried = f"{sum(each.held for each in limits)} of {len(limits)} cells ran within their predicted reserved peak"
    head = f"# {content['device']}: validated on {len(sizes)} cells\n\n{held}\n\n{tried}, at most 3 % of it unused."
    write_whole(out / "summary.md", f"{head}\n\n```\n{validation_text(found)}\n```\n")
    return exceeded


def profile_content(run: Run, base: Profile, errors: list[float], *, verified: bool) -> dict[str, Any]:
    """The content of the profile: the facts of the run's device and its records, and `base` where they say nothing.

    errors: of peak allocated memory, without their signs.
    """
    device = (run.environment.get("gpus", {}).get("devices") or [{}])[0]
    name = str(device.get("name") or base.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    facts: dict[str, Any] = {
        "memory_bytes": device.get("memory_bytes"),
        "compute_capability": device.get("compute_capability"),
        "context_bytes": _typical(run, "context_bytes"),
    }
    if torch.cuda.is_available() and torch.cuda.get_device_name() == name:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"usable_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    # A step has the workspaces of two threads, but for other kernels' that torch keeps as well.
    workspace = _typical(run, "workspace_bytes")
    if workspace is not None and workspace == 2 * base.cublas_workspace_bytes:
        facts["cublas_workspace_bytes"] = workspace // 2
    measured = {key: value for key, value in facts.items() if value is not None}
    assumed = base.model_dump(by_alias=True, exclude={"name", "device", "verified", "validated", "sources"})
    torch_version = str(run.environment.get("torch", {}).get("torch", torch.__version__))
    return {
        **{"schema": 1, "name": slug if slug not in PROFILES else f"{slug}-measured", "device": name},
        **{key: value for key, value in (assumed | measured).items() if value is not None and key != "schema"},
        "verified": verified,
        "validated": {
            "cells": len(errors),
            "median": round(median(errors), 6),
            "worst": round(max(errors), 6),
            "torch": torch_version,
        },
        "sources": [
            f"{', '.join(measured)}: measured by reports/campaigns/device_profile.py",
            f"the rest: profile {base.name}",
        ],
    }


def _typical(run: Run, metric: str) -> int | None:
    """The median of a metric over the cells that have it; None: none has."""
    values = [value for record in run.records if isinstance(value := record.value(metric), int)]
    return round(median(values)) if values else None


if __name__ == "__main__":
    sys.exit(main())
