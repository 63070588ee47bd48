"""`meftbench run`: sweep a suite."""

from __future__ import annotations

import shlex
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meftbench.cli import completion
from meftbench.cli.options import MOST_JOBS, AllowCode, at_terminal, say_next, typed
from meftbench.cli.output import put, put_error, put_json
from meftbench.errors import CELLS_FAILED, DONE, INTERRUPTED, TERMINATED, UserError, unknown
from meftbench.escapes import path_text, single_line

if TYPE_CHECKING:
    from meftbench.plan.suite import Suite
    from meftbench.records.store import Run
    from meftbench.runner.duration import Duration
    from meftbench.runner.engine import Engine

ENGINES = ("local", "ray", "slurm")


def run(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Argument(
            help="A name of `meftbench list suites`, or the path of a YAML file.", autocompletion=completion.suites
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Run folder.  [default: runs/NAME-TIME]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Finish the run in --out (or the newest of this suite).")
    ] = False,
    retry: Annotated[
        str, typer.Option(metavar="STATUS,...", help="With --resume: try cells again that ended so: error,timeout.")
    ] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=GLOB,...", help="Only cells that match all parts; given again: or those of another."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Start at most so many cells.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and stop.")] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cuda, cuda:PROFILE, counted or predicted:PROFILE, for all cells.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_JOBS,
            help="Cells at a time; on CUDA one cell a GPU. Default: 1, and on a cluster as many as it has room for.",
        ),
    ] = None,
    gpus: Annotated[str, typer.Option(metavar="I,J,...", help="GPUs to use, as `nvidia-smi` counts them.")] = "",
    timeout: Annotated[str | None, typer.Option(help="Time allowed for a cell: 90s, 10m.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Fresh processes for a cell.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every start and end, and tracebacks.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop after the first error or timeout.")] = False,
    allow_code: AllowCode = False,
    engine: Annotated[str, typer.Option(help="Where cells run: local, ray or slurm.")] = "local",
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="With --engine ray: the cluster's head.  [default: auto]")
    ] = "",
    slurm: Annotated[
        str, typer.Option(metavar="NAME=VALUE,...", help="With --engine slurm: options of sbatch, such as account=me.")
    ] = "",
) -> None:
    """Run every cell of SUITE, each in a process of its own, and print the comparison.

    A suite that names MODULE:FUNCTION is code: it is imported only with --allow-code, or where the suite itself has
    `allow_code: true`.

    Exits 3 if a cell ended in error or timeout (out of memory is a result), 5 if --where matches nothing.
    """
    from dataclasses import replace

    from meftbench.plan.suite import load_suite
    from meftbench.plan.where import parse_where

    plan = _overridden(load_suite(suite), device, timeout, repeats)
    plan = replace(plan, allow_code=plan.allow_code or allow_code)
    chosen, retried = parse_where(where or []), _statuses(retry)
    if dry_run:
        _print_cells(plan, [cell for cell in plan.cells if chosen(cell)][:limit], jobs or 1, as_json)
        return
    folder = out or _folder(plan, resume or bool(retried))
    options = {
        "resume": resume,
        "retry": retried,
        "where": chosen,
        "limit": limit,
        "fail_fast": fail_fast,
        "engine": engine_named(engine, jobs=jobs, gpus=_indices(gpus), address=address, slurm=slurm),
    }
    finished, expected = sweep_to(folder, plan, typed(context), quiet=quiet, verbose=verbose, **options)
    raise typer.Exit(finish(finished, as_json, expected))


def engine_named(name: str, *, jobs: int | None, gpus: tuple[int, ...], address: str, slurm: str) -> Engine:
    """The engine that the options of the command line describe. Raises UserError: an option is of another engine."""
    for option, given, owner in (("--gpus", gpus, "local"), ("--address", address, "ray"), ("--slurm", slurm, "slurm")):
        if given and name in ENGINES and name != owner:
            raise UserError(
                option, f"is for --engine {owner}, not {name}", f"write --engine {owner}, or leave {option} out"
            )
    if name == "local":
        from meftbench.runner.local_engine import LocalEngine

        return LocalEngine(jobs or 1, gpus)
    if name == "ray":
        from meftbench.runner.ray_engine import RayEngine

        return RayEngine(address or "auto", jobs)
    if name == "slurm":
        from meftbench.runner.slurm_engine import SlurmEngine

        return SlurmEngine(sbatch_options(slurm), jobs)
    raise unknown("--engine", "engine", name, ENGINES)


_SIZES, _DIGITS = ("cpus_per_task", "mem_gb", "gpus_per_node"), 9


def sbatch_options(text: str) -> dict[str, str]:
    """Options of sbatch by their long names with underscores; those without a value have ""."""
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    options = {name.strip().lstrip("-").replace("-", "_"): (equals, value.strip()) for name, equals, value in parts}
    if any(not name or (equals and not value) for name, (equals, value) in options.items()):
        raise UserError("--slurm", f"{text!r} is no list of NAME=VALUE", "write partition=gpu,account=me")
    for name, (_, value) in options.items():
        if name in _SIZES and value.isdecimal() and len(value) > _DIGITS:
            what = f"{name} is a number of {len(value):,} digits, which no machine has"
            raise UserError("--slurm", what, "write a whole number, such as cpus_per_task=8")
    return {name: value for name, (_, value) in options.items()}


def sweep_to(
    folder: Path, suite: Suite, command: str, *, quiet: bool = False, verbose: bool = False, **options: Any
) -> tuple[Run, Duration | None]:
    """Run `suite` into `folder`, with progress. command: what the user typed (`typed`), for the message on resuming.

    Returns the run, and what the cells that were left were expected to take; None: none was left.
    """
    from meftbench.cli.progress import progress
    from meftbench.runner import Event, Noted, Planned, run_suite
    from meftbench.runner.duration import Known, Remaining, history, total

    planned: list[Duration] = []
    with _interruptions(command, folder), progress(quiet, verbose) as tell:

        def on_event(event: Event) -> None:
            if isinstance(event, Planned):
                known = Known(history(folder, tell=lambda note: tell(Noted(note))))
                each = {attempt.key: known.expected(attempt.cell, suite.protocol) for attempt in event.attempts}
                planned.append(total(list(each.values()), event.at_a_time))
                tell.begin(planned[-1], Remaining(each, event.at_a_time))
            tell(event)

        run = run_suite(suite, folder, **options, on_event=on_event)
    return run, planned[-1] if planned else None


def finish(run: Run, as_json: bool, expected: Duration | None) -> int:
    """Print the results of `run`, and return the exit code. expected: what its cells were expected to take."""
    code = CELLS_FAILED if any(r.status in ("error", "timeout") for r in run.records) else DONE
    if as_json:
        put_json(_summary(run, code, expected))
    else:
        _print_run(run)
    if expected is None:
        put_error(_nothing_left(run))
    return code


def _nothing_left(run: Run) -> str:
    """That everything had ended before, and how cells that failed are tried again."""
    from meftbench.report.views.not_run import to_go_on

    failed = sorted({record.status for record in run.records if record.status in ("error", "timeout")})
    cure = f"; `{to_go_on(run, retry=','.join(failed))}` tries again what ended in {' or '.join(failed)}"
    return f"note: nothing was left to run{cure if failed else ''}"


def _overridden(suite: Suite, device: str | None, timeout: str | None, repeats: int | None) -> Suite:
    """The suite with the values of the command line in place of its own. Raises UserError: a value is not valid."""
    from dataclasses import replace

    from meftbench.units import parse_duration

    changes: dict[str, Any] = {}
    if timeout is not None:
        try:
            changes["timeout"] = parse_duration(timeout)
        except ValueError as error:
            raise UserError("--timeout", str(error).partition(";")[0], "write 600s, 10m or 1h") from None
        if changes["timeout"] <= 0:
            raise UserError("--timeout", f"{timeout} leaves no time", "write 600s, 10m or 1h")
    if repeats is not None:
        changes["repeats"] = repeats
    if changes:
        suite = replace(suite, protocol=suite.protocol.model_copy(update=changes))
    return suite if device is None else on_device(suite, device)


def on_device(suite: Suite, device: str) -> Suite:
    """The suite on `device`; `auto` is cuda where there is a GPU, and counted elsewhere. Raises UserError."""
    from meftbench.plan.point import parse_device
    from meftbench.runner import gpus

    if device == "auto":
        device = "counted" if gpus.read().absent else "cuda"
    if device.startswith("predicted:") and any(cell.training for cell in suite.cells):
        raise UserError("--device", "a training cannot be predicted", "write auto, cuda or counted")
    return suite.on(parse_device("--device", device))


def _statuses(text: str) -> frozenset[str]:
    from meftbench.runner.sweep import RETRYABLE

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in RETRYABLE:
            raise unknown("--retry", "status", name, RETRYABLE)
    return frozenset(names)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(index) for index in text.split(",") if index.strip()))
    except ValueError:
        raise UserError("--gpus", f"{text!r} is not a list of indices", "write 0 or 0,1") from None


def _folder(suite: Suite, resume: bool) -> Path:
    from meftbench.runner.folder import default_folder, latest_folder

    return latest_folder(suite) if resume else default_folder(suite.name)


@contextmanager
def _interruptions(command: str, folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the sweep with exit codes 130 and 143, and print how to resume it."""

    def terminate(*_: object) -> None:
        raise SystemExit(TERMINATED)

    previous_handler = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        cure = f"`meftbench {command} --out {shlex.quote(str(folder))} --resume` goes on"
        put_error(f"meftbench: interrupted: finished records are kept in {path_text(folder)}; {cure}")
        raise typer.Exit(INTERRUPTED if isinstance(end, KeyboardInterrupt) else TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _print_cells(suite: Suite, cells: list[Any], jobs: int, as_json: bool) -> None:
    from meftbench.cli.estimate import folded
    from meftbench.errors import NOTHING_MATCHED
    from meftbench.plan.factories import calls_of
    from meftbench.runner.duration import Known, duration, history

    if not cells:
        raise UserError("--where", f"none of the {len(suite.cells)} cells matches", "change it", NOTHING_MATCHED)
    repeats = {cell.cell_id: suite.protocol.repeats_on(cell.device) for cell in cells}
    code = sorted({name for name, _ in calls_of(cells)})
    attempts = [cell for cell in cells for _ in range(repeats[cell.cell_id])]
    expected = duration(attempts, suite.protocol, Known(history()), jobs)
    if as_json:
        listed = [{"cell_id": c.cell_id, "label": c.label, "device": c.device} for c in cells]
        content = {"suite": suite.name, "suite_id": suite.suite_id, "cells": listed, "processes": sum(repeats.values())}
        content |= ({"code": code} if code else {}) | expected.to_json()
        put_json(content)
        return
    width = shutil.get_terminal_size().columns
    for cell in cells:
        label = single_line(cell.label)
        line = f"{cell.cell_id}  {cell.device:<8} {label}"
        # In a pipe a cell is a line; a terminal shows a long label below, whole.
        put(line if len(line) <= width or not at_terminal() else f"{cell.cell_id}  {cell.device}\n  {label}")
    processes = sum(repeats.values())
    put(f"{_count(len(cells), 'cell', 'cells')}, {_count(processes, 'process', 'processes')}; nothing was run")
    put(*folded([f"a run: {expected.sentence()}"]))
    if code:
        allowed = "" if suite.allow_code else ", with --allow-code only"
        put(f"a run imports and calls code: {', '.join(code)}{allowed}; nothing was imported")


def _count(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _summary(run: Run, code: int, expected: Duration | None) -> dict[str, Any]:
    from meftbench.report.results import frame_of
    from meftbench.report.views.answer import headline
    from meftbench.report.views.not_run import cells_not_run
    from meftbench.runner.duration import total

    return {
        "run": str(run.path),
        "run_id": run.run_id,
        "suite": run.name,
        "suite_id": run.suite["suite_id"],
        "counts": dict(Counter(record.status for record in run.records)),
        "exit_code": code,
        **(expected or total([])).to_json(),
        "answer": headline(frame_of(run), not_run=cells_not_run(run)),
        "records": [record.to_json() for record in run.records],
    }


def _print_run(run: Run) -> None:
    from meftbench.cli.estimate import folded
    from meftbench.records.store import BUDGETS
    from meftbench.report.render.terminal import print_summary
    from meftbench.report.results import frame_of
    from meftbench.report.views.answer import headline
    from meftbench.report.views.not_run import cells_not_run

    frame = frame_of(run)
    print_summary(run, frame=frame)
    if sentences := headline(frame, not_run=cells_not_run(run)):
        put("", *folded(sentences))
    put("", f"run folder: {path_text(run.path)}")
    budgets = [("check", run.path)] if (run.path / BUDGETS).is_file() else []
    say_next(("report", run.path), *budgets, ("show", run.path, "CELL"))
