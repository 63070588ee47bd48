"""The part of an engine of many machines that runs on each of them: jobs come as JSON, and outcomes go back as JSON.

A node has a worker (runner/process.py) in a temporary folder, as a run on one machine has it in the run folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meftbench.errors import NOT_COMPARABLE, UserError, one_line
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import CELL_FOLDER
from meftbench.records.checks import check_environment
from meftbench.records.record import Metric
from meftbench.records.store import refuse_links, replace_file
from meftbench.runner import gpus, host, logs
from meftbench.runner.data_check import read_data
from meftbench.runner.engine import COUNTED, Slot, Work, check_torch, kind_of, refuse_without_slot
from meftbench.runner.job import Job, Machine, Outcome
from meftbench.runner.local_engine import kinds_of_gpu, machine_of, worker_variables
from meftbench.runner.process import WORKER, Worker, utc_now

# Runs a command as a child of a child, and ends as it ends. Ray ends a process together with its children, by SIGKILL,
# and a worker that is ended so leaves its cells. As a child of a child it sees its standard input end, and ends them.
_APART = """
import os, sys
pid = os.fork()
if not pid:
    os.execv(sys.argv[1], sys.argv[1:])
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)
"""
# Waits until the process that started it has ended, and removes a folder: a second later, when the worker, which ends
# at the same moment, has ended its cells.
_REMOVER = "import shutil, sys, time; sys.stdin.read(); time.sleep(1); shutil.rmtree(sys.argv[1], ignore_errors=True)"


class Node:
    """One slot of a machine.

    command: stands in for the worker's.  Files are in a temporary folder, which is removed when this process has ended.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = _apart(command or WORKER)
        self._worker: Worker | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="meftbench-node-"))
        (self._folder / "logs").mkdir()
        self._remover = subprocess.Popen(
            _apart((sys.executable, "-c", _REMOVER, str(self._folder))), stdin=subprocess.PIPE, start_new_session=True
        )

    def close(self) -> None:
        """End the worker and its cells, and have the folder removed, where the process goes on."""
        if self._worker is not None:
            self._worker.close()
        if self._remover.stdin is not None:
            self._remover.stdin.close()
        self._remover.wait()

    def begin(self, request: str) -> str:
        """Start the worker. request: JSON of {"work", "gpu", "threads", "slots"} (`begin_request`).

        Returns JSON of {"machine", "slot"} (without the slot's name), or of {"user_error"}.
        """
        asked = json.loads(request)
        try:
            return json.dumps(self._begin(work_from(asked["work"]), asked["gpu"], asked["threads"], asked["slots"]))
        except UserError as error:
            return json.dumps({"user_error": _fields_of(error)})

    def _begin(self, work: Work, gpu: bool, threads: int, slots: int) -> dict[str, Any]:
        devices = gpus.read()
        kinds, visible = frozenset({COUNTED}), ""
        memory_bytes: int | None = host.available_bytes() // slots
        if gpu:
            # Ray and Slurm count as the driver does; CUDA may count otherwise, but knows UUIDs.
            indices = _indices(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            own = gpus.slots(devices, indices, work.gpus, os.environ)
            if work.protocol.exclusive:
                gpus.refuse_shared(devices, own)
            kinds = frozenset.intersection(*(kinds_of_gpu(devices, gpu, work.kinds) for gpu in own))
            visible, memory_bytes = ",".join(own), None
        self._worker = Worker(worker_variables(work, threads), self._folder / "logs" / "worker.log", self._command)
        self._machine = machine_of(devices, self._worker.facts)
        if gpu:
            check_torch(work, self._machine)
        self._kinds, self._visible, self._memory_bytes = kinds, visible, memory_bytes
        slot = {"kinds": sorted(kinds), "gpu": visible, "threads": threads, "memory_bytes": memory_bytes}
        return {"machine": asdict(self._machine), "slot": slot}

    def run(self, request: str) -> tuple[str, dict[str, bytes]]:
        """Run the job of a `job_request` to its end.

        Returns JSON of an outcome (`outcome_from` reads it), or of {"user_error"} where it has none since a disk of
        this machine is full; and the files that the cell keeps, by their paths in the cell's folder.
        """
        content = json.loads(request)
        name = f"{content['cell_id']}-{content['repeat']}"
        kept = self._folder / "cells" / name
        environment = content["environment"] | {"CUDA_VISIBLE_DEVICES": self._visible}
        if CELL_FOLDER in environment:
            environment |= {CELL_FOLDER: str(kept)}
        job = Job(
            Cell.model_validate_json(json.dumps(content["cell"])),
            content["repeat"],
            Protocol.model_validate_json(json.dumps(content["protocol"])),
            result=self._folder / "logs" / f"{name}.json",
            log=self._folder / "logs" / f"{name}.log",
            timeout=content["timeout"],
            threads=content["threads"],
            memory_bytes=self._memory_bytes,
            environment=environment,
        )
        assert self._worker is not None, "`begin` comes first"
        try:
            refuse_without_slot([kind_of(job.cell)], [self._kinds], "this machine has another card")
            self._worker.give(job)
            outcome = self._worker.poll()
        except UserError as error:
            return json.dumps({"user_error": _fields_of(error)}), {}
        assert outcome is not None, "a job was given"
        files = {str(file.relative_to(kept)): file.read_bytes() for file in kept.rglob("*") if file.is_file()}
        shutil.rmtree(kept, ignore_errors=True)  # it has been read, and may be large
        return json.dumps(_outcome_to_json(outcome)), files


def _apart(command: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-c", _APART, *command)


def data_answers(cells: str) -> str:
    """JSON of what `read_data` finds on this machine. cells: JSON of a list of cells."""
    return json.dumps(read_data([Cell.model_validate_json(json.dumps(cell)) for cell in json.loads(cells)]))


def _indices(visible: str) -> tuple[int, ...]:
    """The devices of a CUDA_VISIBLE_DEVICES that counts them; none where it has UUIDs."""
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(map(int, names)) if all(name.isdigit() for name in names) else ()


def _fields_of(error: UserError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in ("where", "what", "cure", "exit_code")}


# --- what is said between driver and node ---


def begin_request(work: Work, gpu: bool, threads: int, slots: int) -> str:
    """What `Node.begin` takes. gpu: whether the slot has one.  slots: on that machine, which share its memory."""
    content = {"kinds": sorted(work.kinds), "trains": work.trains, "protocol": work.protocol.model_dump(mode="json")}
    content |= {"calls": list(work.calls), "folder": work.folder, "gpus": work.gpus}
    return json.dumps({"work": content, "gpu": gpu, "threads": threads, "slots": slots})


def work_from(content: Mapping[str, Any]) -> Work:
    """The work of a `begin_request`; without its folder where this machine has no such folder."""
    folder = content["folder"] if os.path.isdir(content["folder"]) else os.getcwd()
    protocol = Protocol.model_validate_json(json.dumps(content["protocol"]))
    return Work(frozenset(content["kinds"]), content["trains"], protocol, content["calls"], folder, content["gpus"])


def begun_from(answer: str, where: str, name: str) -> tuple[Machine, Slot]:
    """The machine and the slot, which is called `name`, of what `Node.begin` returned at `where`. Raises UserError: the
    one that it tells of, or the answer is none."""
    try:
        content = _answer(answer, where)
        slot = content["slot"] | {"name": name, "kinds": frozenset(content["slot"]["kinds"])}
        machine = Machine(**content["machine"])
        check_environment(dict(machine.environment))
        named = {*machine.environment["meftbench"]} | {*machine.environment["host"]} | {*machine.environment}
        if lacking := sorted({"version", "code_digest", "bf16_products", "environment_id"} - named):
            raise ValueError(f"its environment lacks {', '.join(lacking)}")
        return machine, Slot(**slot)
    except _NO_ANSWER as error:
        what = f"its answer cannot be read ({type(error).__name__}: {one_line(error)[:200]})"
        raise UserError(where, what, "install the same meftbench there", NOT_COMPARABLE) from None


def job_request(job: Job) -> str:
    """What `Node.run` takes: the job without its files, which are the driver's, and without its device and memory,
    which are the node's."""
    content = {"cell_id": job.cell.cell_id, "cell": job.cell.model_dump(mode="json"), "repeat": job.repeat}
    content |= {"protocol": job.protocol.model_dump(mode="json"), "timeout": job.timeout, "threads": job.threads}
    return json.dumps(content | {"environment": dict(job.environment)})


# Fields of an outcome that are used before its record is made and checked.
_KINDS = {"status": str, "detail": dict, "observed": dict, "lost": bool, "log": str}
_PLAIN = ("status", "detail", "observed", "pid", "started_at", "finished_at", "wall_s", "lost")


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    log = outcome.job.log
    content = {name: getattr(outcome, name) for name in _PLAIN}
    content["metrics"] = {name: metric.to_json(name) for name, metric in outcome.metrics.items()}
    return content | {"log": log.read_text(errors="replace") if log.exists() else ""}


def outcome_from(answer: str, job: Job, machine: Machine) -> Outcome:
    """The outcome of a job from what `Node.run` returned on `machine`; what the job printed is written to its log. An
    answer that is none is an `error`.

    Raises UserError: the one that the answer tells of, with the machine's name.
    """
    try:
        content = _answer(answer, machine.host)
        plain = {name: content[name] for name in _PLAIN}
        if wrong := [name for name, kind in _KINDS.items() if type(content[name]) is not kind]:
            raise TypeError(f"{wrong[0]} is no {_KINDS[wrong[0]].__name__}")
        metrics = {name: Metric.from_json(metric) for name, metric in content["metrics"].items()}
        printed = content["log"].encode(errors="replace")
    except _NO_ANSWER as error:
        return without_answer(job, machine, f"{type(error).__name__}: {one_line(error)[:200]}")
    if printed:
        job.log.parent.mkdir(exist_ok=True)
        with logs.opened(job.log) as log:
            log.write(printed)
    return Outcome(job, **plain, metrics=metrics, machine=machine)


def without_answer(job: Job, machine: Machine | None, why: str) -> Outcome:
    """The outcome of a job of which a machine has answered what cannot be read."""
    now = utc_now()
    detail = {"type": "NoResult", "message": f"the answer of its machine cannot be read ({why})"}
    return Outcome(job, "error", detail, {}, {}, None, now, now, 0.0, machine)


# What reading an answer raises that has another form; others than meftbench may write where Slurm's jobs leave theirs.
_NO_ANSWER = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _answer(answer: str, where: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(answer)
    if error := content.get("user_error"):
        raise UserError(**error | {"where": f"{where}: {error['where']}"})
    return content


def keep_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files that a cell keeps into its folder in the run. Raises UserError: a path leads out of it."""
    for name, content in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(name, "is no file in the folder of its cell", "see what its machine answers")
        refuse_links(folder, folder / name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, content)
