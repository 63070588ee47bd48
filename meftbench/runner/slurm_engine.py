"""`--engine slurm`: cells as jobs of Slurm, in arrays, through submitit.

A job leaves its result as a file in the run folder, which the nodes share with this machine. Slurm decides when and
where jobs run; a job that it preempts and queues again runs its cell again.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from meftbench.documents import json_object_of
from meftbench.errors import NOT_COMPARABLE, UserError, one_line
from meftbench.plan.cell import Cell
from meftbench.plan.identity import digest
from meftbench.plan.training import CELL_FOLDER
from meftbench.records.record import Status
from meftbench.records.store import refuse_links, replace_file
from meftbench.runner import node
from meftbench.runner.data_check import read_data
from meftbench.runner.engine import COUNTED, Slot, Work, kind_of
from meftbench.runner.job import Job, Machine, Outcome
from meftbench.runner.process import START_SECONDS, utc_now
from meftbench.runner.same_versions import refuse_other_code, refuse_other_versions, version_reader
from meftbench.runner.slurm_jobs import LOST, LocalStates, SlurmStates, cancel_jobs, submitted

MOST_AT_A_TIME = 64  # jobs, where `jobs` does not say
LOOK_SECONDS = 1.0  # between looks at the shared folder
# Options that submitit has names for; all others are sbatch's alone.
_GENERAL = ("mem_gb", "cpus_per_task", "gpus_per_node")
# Options of sbatch that meftbench and submitit set themselves.
_OWN = {"array", "job_name", "name", "nodes", "ntasks", "ntasks_per_node", "signal", "wrap"}
_OWN |= {"error", "open_mode", "output"}
# Status and type of a cell whose job Slurm has ended.
_ENDED: dict[str, tuple[Status, str]] = {"TIMEOUT": ("timeout", "Timeout"), "OUT_OF_MEMORY": ("oom", "Killed")}


@dataclass(frozen=True)
class _Submitted:
    """job: of submitit.  result: the file that it will leave."""

    job: Any
    given: Job
    result: Path
    started_at: str
    start: float


class SlurmEngine:
    """The cells of a sweep as jobs of Slurm, at most `jobs` at a time.

    options: of `sbatch`, such as {"partition": "gpu", "cpus_per_task": "8", "exclusive": ""}; "": without a value.
    cluster: "local" runs the jobs on this machine, without Slurm.  command: replaces the worker.
    """

    def __init__(
        self,
        options: Mapping[str, str],
        jobs: int | None = None,
        cluster: str = "slurm",
        command: Sequence[str] | None = None,
    ) -> None:
        self._options, self._jobs, self._cluster, self._command = dict(options), jobs, cluster, command
        self._slots: list[Slot] = []
        self._collected: list[tuple[Job, Path]] = []
        self._submitted: list[_Submitted] = []
        self._folder: Path | None = None
        self._first: Any = None  # the job that describes its node, until it has
        self._number = 0

    def survey(self, work: Work) -> None:
        """Slurm has room for whatever it accepts.

        Raises UserError: an option that is not the user's to give; submitit or Slurm is not there (exit 4)."""
        self._submitit = _submitit()
        if given := sorted(_OWN & self._options.keys()):
            what = (
                f"{given[0]}: is meftbench's to set: a cell is a job of one task, which is found by its name and files"
            )
            raise UserError("--slurm", what, "leave it out; `comment=...` takes any text")
        absent = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
        if self._cluster == "slurm" and absent:
            what = f"there is no `{absent[0]}` on this machine"
            raise UserError("--engine slurm", what, "run this on a login node of the cluster", NOT_COMPARABLE)
        cpus = self._options.get("cpus_per_task", "1")
        threads = work.protocol.threads or (int(cpus) if cpus.isdecimal() and int(cpus) else 1)
        number = self._jobs or MOST_AT_A_TIME
        self._slots = [Slot(f"job {n}", work.kinds, threads=threads) for n in range(number)]

    def data_answers(self, cells: Sequence[Cell]) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """The data as this machine has them, which shares its files with the nodes."""
        return {} if self._command else {"": read_data(cells)}

    def start(self, work: Work, logs: Path) -> list[Machine]:
        """Run a job that describes its node. Raises UserError (exit 4): sbatch refuses it, it fails, the node has other
        versions."""
        self._work, self._results = work, (logs / "slurm").absolute()
        name = f"meftbench-{digest(str(self._results))[:8]}"
        self._general = {"name": name}
        self._states = SlurmStates() if self._cluster == "slurm" else LocalStates()
        if self._cluster == "slurm":
            cancel_jobs(name)  # which an earlier run in this folder has left in the queue, since it was killed
        refuse_links(logs.absolute().parent, self._results)
        shutil.rmtree(self._results, ignore_errors=True)
        # A job of an earlier run that is being cancelled, or whose node did not hear of it, may still leave a result.
        self._folder = self._results / secrets.token_hex(4)
        self._folder.mkdir(parents=True)
        result = self._folder / "node.json"
        with_gpu = bool(work.kinds - {COUNTED})
        executor = self._executor(with_gpu, 600)
        request = node.begin_request(work, with_gpu, self._slots[0].threads, 1)
        jobs = submitted(partial(executor.submit_array, [Description(request, str(result), self._command)]))
        self._first = job = jobs[0]
        while not result.exists():
            if (state := self._states.ended(job)) and not result.exists():
                what = f"the first job ended as {state}, without a result: {_end_of(job)}"
                raise UserError("--engine slurm", what, "see to it, and try again", NOT_COMPARABLE)
            time.sleep(LOOK_SECONDS)
        self._first = None
        content = json_object_of(result)
        host = str(content.get("host"))
        versions = content.get("versions")
        refuse_other_versions([(host, versions if isinstance(versions, dict) else {})])
        machine, _ = node.begun_from(content.get("begun", ""), host, "")
        return [machine]

    def slots(self) -> list[Slot]:
        return self._slots

    def give(self, job: Job, slot: Slot) -> None:
        assert self._folder is not None, "`start` comes first"
        self._number += 1
        job.log.unlink(missing_ok=True)
        self._collected.append((job, self._folder / f"{self._number}.json"))

    def poll(self) -> Outcome | None:
        self._submit()
        while self._submitted:
            jobs = [waiting.job for waiting in self._submitted]
            for waiting in self._submitted:
                state = "" if waiting.result.exists() else self._states.ended(waiting.job, jobs)
                if state or waiting.result.exists():  # in this order: a job may leave its result between the two
                    self._submitted.remove(waiting)
                    return self._outcome(waiting, state)
            time.sleep(LOOK_SECONDS)
        return None

    def close(self) -> None:
        for job in [self._first, *(waiting.job for waiting in self._submitted)]:
            if job is not None:
                job.cancel(check=False)
        self._first = None
        self._submitted.clear()
        self._collected.clear()
        if self._folder is not None:
            shutil.rmtree(self._results, ignore_errors=True)

    # --- jobs ---

    def _submit(self) -> None:
        """Submit what was given since, as one array of cells that need a GPU and one of those that need none."""
        for with_gpu in (False, True):
            together = [(job, file) for job, file in self._collected if (kind_of(job.cell) != COUNTED) == with_gpu]
            if not together:
                continue
            seconds = max(job.timeout for job, _ in together) + START_SECONDS + 600  # imports on a cold file system
            begin = node.begin_request(self._work, with_gpu, self._slots[0].threads, 1)
            cells = [
                CellOfJob(begin, node.job_request(job), str(file), job.environment.get(CELL_FOLDER), self._command)
                for job, file in together
            ]
            executor = self._executor(with_gpu, seconds)
            jobs = submitted(partial(executor.submit_array, cells))
            self._submitted += [
                _Submitted(of_slurm, job, file, utc_now(), time.monotonic())
                for of_slurm, (job, file) in zip(jobs, together, strict=True)
            ]
        self._collected.clear()

    def _executor(self, with_gpu: bool, seconds: float) -> Any:
        assert self._folder is not None
        general: dict[str, Any] = self._general | {"timeout_min": math.ceil(seconds / 60)}
        if with_gpu:
            general["gpus_per_node"] = self._work.gpus
        general |= {
            name: int(value) if value.isdecimal() else value
            for name, value in self._options.items()
            if name in _GENERAL
        }
        general["slurm_additional_parameters"] = {
            name: value or True for name, value in self._options.items() if name not in _GENERAL
        }
        executor = self._submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        try:
            executor.update_parameters(**general)
        except AssertionError as error:
            raise UserError("--slurm", one_line(error), "write a whole number, such as cpus_per_task=8") from None
        return executor

    def _outcome(self, waiting: _Submitted, state: str) -> Outcome:
        job = waiting.given
        if not waiting.result.exists():
            return _without_result(waiting, state)
        try:
            content = json_object_of(waiting.result)
        except UserError as error:
            return node.without_answer(job, None, error.what)
        finally:
            waiting.result.unlink(missing_ok=True)
        machine, _ = node.begun_from(content.get("begun", ""), str(content.get("host")), "")
        refuse_other_code(machine)
        return node.outcome_from(content.get("answer", ""), job, machine)


def _without_result(waiting: _Submitted, state: str) -> Outcome:
    """How a job ended that has left no result, as Slurm tells it."""
    status, kind = _ENDED.get(state, ("error", "NodeLost" if state in LOST else "NoResult"))
    message = f"its Slurm job {waiting.job.job_id} ended as {state}: {_end_of(waiting.job)}"
    wall_s = time.monotonic() - waiting.start
    detail = {"type": kind, "message": message}
    times = (waiting.started_at, utc_now(), wall_s)
    return Outcome(waiting.given, status, detail, {}, {}, None, *times, lost=state in LOST)


def _end_of(job: Any) -> str:
    lines = (job.stderr() or "").strip().splitlines()
    return lines[-1][:400] if lines else "it printed nothing"


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        what = f"needs submitit ({one_line(error)})"
        raise UserError("--engine slurm", what, "pip install 'meftbench[slurm]'") from None
    return submitit


# --- in the job ---


@dataclass(frozen=True)
class Description:
    """A job that writes what it finds of its node to a file. begin: of `node.begin_request`."""

    begin: str
    result: str
    command: Sequence[str] | None

    def __call__(self) -> None:
        slot = node.Node(self.command)
        begun = slot.begin(self.begin)
        slot.close()
        _leave(self.result, {"begun": begun, "versions": version_reader()()})

    def checkpoint(self) -> Any:
        return _again(self)


@dataclass(frozen=True)
class CellOfJob:
    """A job that runs a cell, and writes its outcome to a file.

    begin, request: of `node.begin_request`, `node.job_request`.  kept: folder for the files that the cell keeps.
    """

    begin: str
    request: str
    result: str
    kept: str | None
    command: Sequence[str] | None

    def __call__(self) -> None:
        ending = list[int]()
        signal.signal(signal.SIGTERM, lambda number, frame: ending.append(number))
        slot = node.Node(self.command)
        begun, answer = slot.begin(self.begin), None
        if "user_error" not in json.loads(begun):
            answer, files = slot.run(self.request)
            node.keep_files(files, Path(self.kept or ""))
        slot.close()
        # Slurm sends SIGTERM to all processes of a job that it cancels or preempts, which ends the cell, and kills what
        # is left some time later. How the cell ended then is no result, and a job that ends itself is not queued again.
        while ending and (answer is None or json.loads(answer).get("status") != "ok"):
            signal.pause()
        _leave(self.result, {"begun": begun, "answer": answer})

    def checkpoint(self) -> Any:
        """Called by submitit when Slurm preempts the job: the cell runs again when the job does."""
        return _again(self)


def _again(call: Any) -> Any:
    return _submitit().helpers.DelayedSubmission(call)


def _leave(result: str, content: dict[str, Any]) -> None:
    replace_file(Path(result), json.dumps({"host": socket.gethostname()} | content).encode())
