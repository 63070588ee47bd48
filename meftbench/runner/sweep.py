"""The sweep: starts the cells in the order of the schedule, waits for them, and writes each record at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from meftbench.errors import NOT_COMPARABLE, NOTHING_MATCHED, UserError, unknown
from meftbench.plan.cell import Cell
from meftbench.plan.factories import check_allowed
from meftbench.plan.suite import Suite, load_suite
from meftbench.plan.training import BEST, CELL_FOLDER
from meftbench.records.record import Record, Status
from meftbench.records.store import (
    RECORDS,
    RESUME,
    Run,
    ended_by_disk,
    folder_at,
    load_run,
    refuse_link,
    refuse_links_within,
    subfolder,
)
from meftbench.records.writer import NoRecordError, Writer, writing
from meftbench.runner import folder, logs
from meftbench.runner.attempt_records import identity, record_of, record_of_nothing, skipped_record
from meftbench.runner.choice import Rates
from meftbench.runner.data_check import check_data
from meftbench.runner.engine import Engine, Slot, Work, kind_of
from meftbench.runner.job import Job, Machine
from meftbench.runner.local_engine import LocalEngine
from meftbench.runner.retries import Retries
from meftbench.runner.same_versions import code_digests
from meftbench.runner.schedule import Attempt, Key, Plan, Schedule, pending


@dataclass(frozen=True)
class Planned:
    """The run is about to begin: its attempts in order, and how many run at a time."""

    attempts: tuple[Attempt, ...]
    at_a_time: int


@dataclass(frozen=True)
class Started:
    """A cell was given to the worker. done, total: numbers of attempts in this execution."""

    cell: Cell
    repeat: int
    done: int
    total: int


@dataclass(frozen=True)
class Ended:
    """A cell ended, or was skipped, and its record is on the disk."""

    record: Record
    done: int
    total: int


@dataclass(frozen=True)
class Noted:
    """A sentence that the user should read."""

    text: str


Event = Planned | Started | Ended | Noted
CELLS = "cells"  # folder in a run with trainings: their checkpoints until they end, and the weights that are kept


def run_suite(
    suite: Suite | str | Path,
    out: Path | str,
    *,
    resume: bool = False,
    retry: frozenset[str] = frozenset(),
    jobs: int = 1,
    gpu_indices: tuple[int, ...] = (),
    limit: int | None = None,
    where: Callable[[Cell], bool] | None = None,
    fail_fast: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    command: Sequence[str] | None = None,
    nvml: Any = None,
    engine: Engine | None = None,
) -> Run:
    """Run the cells of `suite` and return the run as it then is in the folder `out`.

    suite: a name of `meftbench list suites`, the path of a YAML file, or what `load_suite` has read.
    resume: resume the run in `out`: cells that have ended are not repeated, except for the statuses in `retry`. Cells
        may have been added to the suite since.
    jobs: how many cells run at a time on the CPU; on CUDA one cell a device.
    gpu_indices: the devices to use, as `nvidia-smi` counts them.
    limit: start at most so many cells.  where: run only cells for which it is true.
    fail_fast: start nothing more after the first `error` or `timeout`.
    on_event: called with `Planned`, and with each `Started`, `Ended` and `Noted`.
    command, nvml: replace the worker and `pynvml`.
    engine: where cells run, in place of this machine; `jobs`, `gpu_indices`, `command` and `nvml` are then its own.
    KeyboardInterrupt, SystemExit: the running cells are killed, finished records are kept.

    Raises UserError: the folder is not empty, not writable, in use, or of a protocol or cells that
    `suite` does not have (exit 4); data of a task that cannot be used, or have changed since (exit 4);
    code of the user's own is not allowed, or cannot be imported or called;
    CUDA is asked for and absent, or busy (exit 4); `where` matches nothing (exit 5); the worker cannot start.
    """
    if not isinstance(suite, Suite):
        suite = load_suite(str(suite))
    out = folder_at(out)
    _check_options(jobs=jobs, limit=limit, retry=retry, where=where)
    chosen = [cell for cell in suite.cells if where is None or where(cell)]
    if not chosen:
        cure = "`--dry-run` without it lists them"
        raise UserError("--where", f"none of the {len(suite.cells)} cells matches", cure, NOTHING_MATCHED)
    check_allowed(suite.code, chosen, suite.allow_code)
    engine = engine or LocalEngine(jobs, gpu_indices, command, nvml)
    with closing(engine):
        # Before the engine is asked for machines, which takes time, and again below, when the folder is locked.
        existing_run = folder.earlier_run(suite, out, resume or bool(retry))
        _, finished, plan = _left_to_do(suite, chosen, limit, existing_run, retry)
        # Where nothing is left, machines are asked for the data of trainings only: a run is not shown with other data.
        surveyed = existing_run is None or bool(pending(plan, finished)) or any(cell.training for cell in chosen)
        if surveyed:
            engine.survey(Work.of(chosen, suite.protocol))
            check_data(engine.data_answers(chosen), existing_run)
        with (
            folder.gone_unless_begun(out),
            _disk_errors_end_the_run(out),
            writing(out, lambda note: on_event(Noted(note))) as writer,
        ):
            earlier = folder.earlier_run(suite, out, resume or bool(retry))
            kept_records, finished, plan = _left_to_do(suite, chosen, limit, earlier, retry)
            if note := _without_weights(suite, kept_records.values(), out):
                on_event(Noted(note))
            logs.tidy(out / folder.LOGS)  # what a killed run has left, also where nothing is left to run
            if earlier is not None and not pending(plan, finished):
                return earlier
            if not surveyed:
                raise UserError(str(out), "was changed by another command meanwhile", "run this again")
            scores = scores_of(kept_records.values())
            _execute(suite, writer, earlier, engine, _Sweep(plan, finished, fail_fast, on_event, scores))
            writer.verify()
            run = load_run(out)
            if lost := finished.keys() - {(record.cell_id, record.repeat) for record in run.records}:
                what = f"lacks {len(lost)} of the {len(finished)} records that were written"
                raise UserError(str(out / RECORDS), what, "another program changes it; add --resume to run them again")
    return run


@contextmanager
def _disk_errors_end_the_run(out: Path) -> Iterator[None]:
    """Raise the UserError that ends a run in place of an OSError about a file in its folder `out`."""
    try:
        yield
    except OSError as error:
        file = error.filename
        if not isinstance(file, str | os.PathLike) or not Path(file).absolute().is_relative_to(out.absolute()):
            raise
        raise ended_by_disk(Path(file), error) from None


RETRYABLE = ("error", "timeout", "oom", "skipped")


def _check_options(*, jobs: Any, limit: Any, retry: Any, where: Any) -> None:
    """Raises UserError where an option of `run_suite` is not valid, before anything is written."""
    for name, value, least in (("jobs", jobs, 1), ("limit", limit, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(name, f"{value!r} is not a whole number from {least}", "give one, or leave it out")
    if jobs is None:
        raise UserError("jobs", "is None", "give a whole number from 1, or leave it out")
    if isinstance(retry, str) or not isinstance(retry, Iterable):
        raise UserError("retry", f"{retry!r} is not a set of statuses", f"give some of {', '.join(RETRYABLE)}")
    for status in retry:
        if status not in RETRYABLE:
            raise unknown("retry", "status", status, RETRYABLE)
    if where is not None and not callable(where):
        raise UserError("where", f"{where!r} is not a function of a cell", "give lambda cell: cell.batch_size == 8")


def _without_weights(suite: Suite, kept_records: Iterable[Record], out: Path) -> str:
    """A sentence for the user where earlier trainings did not keep the weights that the suite now keeps; else ""."""
    keeping = {cell.cell_id for cell in suite.cells if cell.training and cell.training.keep == "best"}
    done = [record for record in kept_records if record.status == "ok" and record.cell_id in keeping]
    lacking = [r for r in done if not (out / CELLS / f"{r.cell_id}-{r.repeat}" / BEST).is_dir()]
    if not lacking:
        return ""
    what = f"{len(lacking)} of {len(done)} finished trainings kept no weights, and are not trained again"
    return f"{what}: to keep theirs, run them into another --out with --keep (training: keep: best)"


def _left_to_do(
    suite: Suite, chosen: list[Cell], limit: int | None, earlier: Run | None, retry: frozenset[str]
) -> tuple[dict[Key, Record], dict[Key, Status], Plan]:
    """The records of `earlier` that are kept, the statuses in them, and the plan for what is chosen."""
    kept_records = folder.finished_records(earlier, retry, {cell.cell_id for cell in chosen})
    finished = {key: record.status for key, record in kept_records.items()}
    return kept_records, finished, _plan(suite, chosen, limit, finished)


def _plan(suite: Suite, chosen: list[Cell], limit: int | None, finished: dict[Key, Status]) -> Plan:
    """The plan for `chosen`; with `limit`, for the first so many of them that are not finished."""
    repeats = {cell.cell_id: suite.protocol.repeats_on(cell.device) for cell in chosen}
    plan = Plan(suite.cells, repeats, suite.protocol.on_oom)
    if limit is None:
        return plan
    unfinished = list(dict.fromkeys(attempt.cell.cell_id for attempt in pending(plan, finished)))
    return Plan(suite.cells, {cell_id: repeats[cell_id] for cell_id in unfinished[:limit]}, suite.protocol.on_oom)


SLOW_IN_BF16 = (
    "this processor has no bf16 products: cells in bf16 take many times as long on it as in fp32; what is counted is "
    "right, times are not those of a processor that has them"
)


def _slow_in_bf16(suite: Suite, machines: Iterable[Machine]) -> bool:
    """Whether cells are timed or trained on the CPU in bf16, which a processor has no instructions for."""
    timed = "throughput" in suite.protocol.passes
    slow = [
        cell
        for cell in suite.cells
        if cell.precision.startswith("bf16") and cell.device == "counted" and (timed or cell.training)
    ]
    return bool(slow) and any(machine.environment["host"]["bf16_products"] is False for machine in machines)


def _execute(suite: Suite, writer: Writer, earlier: Run | None, engine: Engine, sweep: _Sweep) -> None:
    logs_folder = subfolder(writer.folder, folder.LOGS)
    if any(cell.training for cell in suite.cells):
        refuse_link(writer.folder / CELLS)
        refuse_links_within(writer.folder / CELLS)
    cells = [cell for cell in suite.cells if sweep.plan.repeats.get(cell.cell_id)]
    work = Work.of(cells, suite.protocol)
    try:
        machines = engine.start(work, logs_folder)
        if earlier is not None:  # the machine on which the run began is its first, if it is there
            began_on = earlier.environment.get("environment_id")
            machines = sorted(machines, key=lambda machine: machine.environment_id != began_on)
        sweep.code = code_digests(suite, machines) if work.calls else {}
        environment = dict(machines[0].environment)
        if earlier is None:
            run_id = folder.begin(writer, suite, environment, sweep.code)
        else:
            run_id = earlier.run_id
            for note in folder.continue_in(writer, earlier, suite, environment, sweep.code):
                sweep.on_event(Noted(note))
        if _slow_in_bf16(suite, machines):
            sweep.on_event(Noted(SLOW_IN_BF16))
        if attempts := tuple(pending(sweep.plan, sweep.finished)):
            sweep.on_event(Planned(attempts, len(engine.slots())))
        sweep.go(engine, writer, suite, run_id, machines[0])
    finally:
        engine.close()
        logs.tidy(logs_folder)


@dataclass
class _Sweep:
    """The state of one execution: what is left to do, and where.

    scores: of trainings, by cell_id.  code: digests of the user's own functions.
    running: the attempts that run now, each with its slot.  environments: ids of those
    that the folder has.  retries: of cells whose machine was lost.  done: how many attempts have ended in this
    execution.
    """

    plan: Plan
    finished: dict[Key, Status]
    fail_fast: bool
    on_event: Callable[[Event], None]
    scores: dict[str, float]
    code: dict[str, str | None] = field(default_factory=dict)
    running: dict[Key, tuple[Attempt, Slot]] = field(default_factory=dict)
    environments: set[str] = field(default_factory=set)
    retries: Retries = field(default_factory=Retries)
    done: int = 0
    stopped: bool = False

    @cached_property
    def _rates(self) -> Rates:
        return Rates(self.plan.cells)

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.plan, self.finished, kind=kind_of)

    def go(self, engine: Engine, writer: Writer, suite: Suite, run_id: str, first: Machine) -> None:
        """Fill the free slots, wait until a cell ends and write its record, until nothing is left.

        first: the machine of records of which no other is known."""
        total = len(pending(self.plan, self.finished))
        self.environments.add(first.environment_id)
        while True:
            slots = engine.slots()
            for attempt, slot in self._next(slots):
                if slot is None:
                    self._write(writer, skipped_record(identity(suite, run_id, first), attempt, self.plan), total)
                    continue
                self.on_event(Started(attempt.cell, attempt.repeat, self.done, total))
                self.running[attempt.key] = attempt, slot
                engine.give(_job(subfolder(writer.folder, folder.LOGS), suite, attempt, slot), slot)
            if not self.running and (self.stopped or self.done == total):
                return
            outcome = engine.poll()
            if outcome is None:
                if engine.slots() != slots:
                    continue
                what = f"no machine is left that can run {total - self.done} of {total} attempts"
                raise UserError("--engine", what, f"see to the machines, {RESUME}", NOT_COMPARABLE)
            attempt, slot = self.running.pop((outcome.job.cell.cell_id, outcome.job.repeat))
            if outcome.lost and self.retries.again(attempt, slot, outcome):
                cure = "`--resume` runs it again" if self.stopped else "it is run again"
                self.on_event(Noted(f"{attempt.cell.label}: {outcome.detail.get('message')}; {cure}"))
                continue
            outcome = self.retries.told(outcome)
            machine = outcome.machine or first
            if machine.environment_id not in self.environments:
                folder.add_environment(writer, machine.environment)
                self.environments.add(machine.environment_id)
            shared = identity(suite, run_id, machine)
            try:
                record = record_of(shared, attempt, outcome, self.code)
                self._write(writer, record, total)
            except NoRecordError as error:
                record = record_of_nothing(shared, attempt, outcome, str(error))
                self._write(writer, record, total)
            self.stopped |= self.fail_fast and record.status in ("error", "timeout")

    def _next(self, slots: Sequence[Slot]) -> Iterator[tuple[Attempt, Slot | None]]:
        """Yield attempts to start, with their slots, or to skip (None), as long as there are free slots."""
        busy = {slot for _, slot in self.running.values()}
        free = [slot for slot in slots if slot not in busy]
        for again, slot in [] if self.stopped else self.retries.placed(free, slots):
            free.remove(slot)
            yield again, slot
        while free and not self.stopped:
            attempt = self._schedule.start(frozenset().union(*(slot.kinds for slot in free)))
            if attempt is None:
                return
            if not attempt.is_skipped and (better := self._rates.better(attempt.cell, self.scores)):
                attempt = replace(attempt, beaten_by=better.cell_id)
            if attempt.is_skipped:
                yield attempt, None
                continue
            slot = next(slot for slot in free if kind_of(attempt.cell) in slot.kinds)
            free.remove(slot)
            yield attempt, slot

    def _write(self, writer: Writer, record: Record, total: int) -> None:
        writer.append(record)
        self.finished[record.cell_id, record.repeat] = record.status
        self._schedule.end((record.cell_id, record.repeat), record.status)
        self.scores |= scores_of([record])
        self.done += 1
        self.on_event(Ended(record, self.done, total))


def _job(logs_folder: Path, suite: Suite, attempt: Attempt, slot: Slot) -> Job:
    name = f"{attempt.cell.cell_id}-{attempt.repeat}"
    return Job(
        attempt.cell,
        attempt.repeat,
        suite.protocol,
        result=logs_folder / f"{name}.json",
        log=logs_folder / f"{name}.log",
        timeout=suite.protocol.timeout,
        threads=slot.threads,
        memory_bytes=slot.memory_bytes,
        environment={"CUDA_VISIBLE_DEVICES": slot.gpu}
        | ({CELL_FOLDER: str(logs_folder.parent.absolute() / CELLS / name)} if attempt.cell.training else {}),
    )


def scores_of(records: Iterable[Record]) -> dict[str, float]:
    """The validation score of each training, by cell_id."""
    scores = ((record.cell_id, record.value("score")) for record in records)
    return {cell_id: score for cell_id, score in scores if isinstance(score, int | float)}
