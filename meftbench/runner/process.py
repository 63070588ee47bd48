"""Controls the worker process (meftbench.worker): starts it, gives it jobs, ends overdue jobs, reads results.

Torch is never imported here. There is a single thread, in which `poll` waits for the worker's next event.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal

from meftbench.errors import RESULT_NOT_WRITTEN, UserError
from meftbench.plan.factories import CALLS, FOLDER
from meftbench.plan.protocol import Protocol
from meftbench.records.record import Metric, Status
from meftbench.records.store import RESUME, ended_by_disk
from meftbench.runner import logs
from meftbench.runner.job import Job, Outcome
from meftbench.runner.oom_kills import of_kill, oom_kills
from meftbench.runner.result_files import disk_error, is_of_disk, read_result

# Named and not imported here, since it imports torch.
WORKER = (sys.executable, "-m", "meftbench.worker")
IMPORT_SECONDS = 600.0
START_SECONDS = 60.0
TERM_SECONDS = 2.0
KILL_SECONDS = 10.0
MAKE_ROOM = f"make room on that disk, or make it writable, {RESUME}"

Stage = Literal["running", "terminated", "killed"]


@dataclass
class _Running:
    job: Job
    started: datetime
    start: float
    deadline: float
    kills: int | None  # by the kernel for memory, before the job began
    stage: Stage = "running"
    pid: int | None = None


def worker_environment(protocol: Protocol, threads: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that the worker is started with.

    The allocator settings are the protocol's, not the shell's: they change reserved memory by up to a third
    (docs/measuring.md 4). The variables that allow the user's own code are not taken from the shell either.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if name not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", FOLDER, CALLS)
    }
    if protocol.alloc_conf:
        environment["PYTORCH_ALLOC_CONF"] = protocol.alloc_conf
    # Where cores are shared, threads that spin while they wait take the cores from the threads they wait for, and a
    # step takes ten times as long. A value that the user has set is kept.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        # numpy's BLAS would start its threads on import, and a process with threads should not fork.
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Lets libraries ask `torch.cuda.is_available()` on import without initialising CUDA before the fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


class Worker:
    """A worker process and the jobs it is running.

    log: file for what the worker itself prints.  command: stands in for `WORKER`.
    facts: what the worker reports of torch once it has started.

    Raises UserError where the worker cannot start (torch is missing, or broken).
    """

    def __init__(self, environment: Mapping[str, str], log: Path, command: Sequence[str] | None = None) -> None:
        self._environment, self._log, self._command = dict(environment), log, tuple(command or WORKER)
        self._jobs: dict[int, _Running] = {}
        self._ended: deque[Outcome] = deque()
        self._disk: UserError | None = None
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.facts: dict[str, Any] = {}
        self._begin()

    @property
    def running(self) -> int:
        """The number of jobs that were given and have not ended."""
        return len(self._jobs)

    def give(self, job: Job) -> None:
        """Give a job to the worker, which starts it at once. A worker that has died is replaced first."""
        if self._process is None:
            self._begin()
        self._number += 1
        for stale in (job.result, job.log):
            stale.unlink(missing_ok=True)
        now = time.monotonic()
        self._jobs[self._number] = _Running(job, datetime.now(UTC), now, now + START_SECONDS, oom_kills())
        line = {
            "id": self._number,
            "verb": "measure",
            "request": {"cell": job.cell.model_dump(mode="json"), "protocol": job.protocol.model_dump(mode="json")},
            "result": str(job.result.resolve()),
            "log": str(job.log.resolve()),
            "threads": job.threads,
            "memory_bytes": job.memory_bytes,
            "environment": dict(job.environment),
            "ends_with_asker": False,  # the server ends its jobs itself
        }
        try:
            stdin, _ = self._pipes()
            stdin.write(json.dumps(line).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            self._died()

    def poll(self) -> Outcome | None:
        """Wait until a job ends and return its outcome; None where none is running. Overdue jobs are ended here.

        Raises UserError: the disk cannot be written, so that a job has no outcome; those of others come first.
        """
        while not self._ended and self._jobs and not self._disk:
            due = min(running.deadline for running in self._jobs.values())
            for event in self._events(max(0.0, due - time.monotonic())):
                self._handle(event)
            now = time.monotonic()
            for number, running in list(self._jobs.items()):
                if now >= running.deadline and number in self._jobs:
                    self._overdue(number, running, now)
        if self._ended:
            return self._ended.popleft()
        if self._disk:
            raise self._disk
        return None

    def close(self) -> None:
        """End the worker and everything it runs; unfinished jobs have no outcome."""
        self._end(grace=TERM_SECONDS)
        for running in self._jobs.values():
            _kill(running.pid, signal.SIGKILL)
        self._jobs.clear()

    # --- the worker process ---

    def _begin(self) -> None:
        self._unread = b""
        with logs.opened(self._log) as log:
            # In its own session the worker does not get the Ctrl-C of the terminal: the runner decides what it means.
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        limit = time.monotonic() + IMPORT_SECONDS
        while self._process is not None:
            for event in self._events(max(0.0, limit - time.monotonic())):
                if event["event"] == "ready":
                    self.facts = event["facts"]
                    return
                if event["event"] == "broken":
                    self._end(grace=TERM_SECONDS)
                    raise self._unusable(event["message"])
            if time.monotonic() >= limit:
                self._end(grace=0)
                raise self._unusable(f"was not ready after {IMPORT_SECONDS:.0f} s")
        raise self._unusable(f"ended while it was starting ({_ending(process.returncode)}): {logs.end_of(self._log)}")

    def _unusable(self, what: str) -> UserError:
        return UserError("worker", what, f"see {self._log}; `meftbench doctor` says what this machine can measure")

    def _end(self, grace: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        stdin, stdout = _pipes(process)
        # A worker that has ended reads nothing any more: bytes not yet sent to it are dropped.
        with suppress(BrokenPipeError):
            stdin.close()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            _kill(process.pid, signal.SIGKILL)
            process.wait()
        stdout.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process is not None
        return _pipes(self._process)

    def _events(self, seconds: float) -> list[dict[str, Any]]:
        """The worker's next events, none if it sends nothing for `seconds`."""
        _, stdout = self._pipes()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        arrived = os.read(stdout.fileno(), 1 << 16)
        if not arrived:
            self._died()
            return []
        *lines, self._unread = (self._unread + arrived).split(b"\n")
        return [event for line in lines if (event := parsed_event(line)) is not None]

    def _died(self) -> None:
        """The worker has died: its jobs end as `error`, lost, and the next job starts another worker."""
        assert self._process is not None
        process = self._process
        self._end(grace=TERM_SECONDS)
        self._lose_jobs(f"the worker died ({_ending(process.returncode)}): {logs.end_of(self._log)}")

    def _lose_jobs(self, message: str) -> None:
        for number, running in list(self._jobs.items()):
            _kill(running.pid, signal.SIGKILL)
            self._without_result(number, {"type": "WorkerDied", "message": message}, lost=True)

    # --- its jobs ---

    def _handle(self, event: dict[str, Any]) -> None:
        if event["event"] not in ("started", "exited"):
            return
        running = self._jobs.get(event["id"])
        if running is None:
            return
        if event["event"] == "started":
            running.pid = event["pid"]
            running.deadline = time.monotonic() + running.job.timeout
        else:
            self._exited(event["id"], running, event["code"])

    def _exited(self, number: int, running: _Running, code: int) -> None:
        result = read_result(running.job.result)
        message = f"{_ending(code)}: {logs.end_of(running.job.log)}"
        if isinstance(result, dict):
            said = str(result["status_detail"].get("message", ""))
            killed = result["status_detail"].get("exit_signal") == signal.SIGKILL  # a rank of a distributed cell
            if result["status"] == "error" and is_of_disk(said, running.job.log.parent.parent):
                self._give_up(number, UserError(running.job.cell.label, said.partition("; ")[0], MAKE_ROOM))
            elif killed and of_kill(running.kills)[0]:
                self._killed(number, running)
            else:
                self._finish(number, **result)
        elif running.stage != "running":
            self._finish(number, "timeout", _timeout(running))
        elif code == -signal.SIGKILL:
            self._killed(number, running)
        elif code < 0:
            self._without_result(number, {"type": "Crash", "message": message, "exit_signal": -code})
        elif code == RESULT_NOT_WRITTEN and disk_error(running.job.log.parent) is None:
            self._give_up(number, UserError(str(running.job.result), f"could not be written ({message})", MAKE_ROOM))
        else:
            self._without_result(number, {"type": "NoResult", "message": f"{result} ({message})"})

    def _killed(self, number: int, running: _Running) -> None:
        """The process was ended by SIGKILL, not sent from here: by the kernel for memory, or by somebody."""
        for_memory, message = of_kill(running.kills)
        detail = {"type": "Killed", "message": message, "exit_signal": int(signal.SIGKILL)}
        if not for_memory:
            self._without_result(number, detail)
            return
        for other in self._jobs.values():  # one kill explains the end of one process
            other.kills = None if other.kills is None else other.kills + 1
        self._finish(number, "oom", detail)

    def _without_result(self, number: int, detail: dict[str, Any], lost: bool = False) -> None:
        """A job has left no result: it ends as `error`, unless no result can be written, which is no fault of its."""
        folder = self._jobs[number].job.log.parent
        if error := disk_error(folder):
            self._give_up(number, ended_by_disk(folder, error))
        else:
            self._finish(number, "error", detail, lost=lost)

    def _give_up(self, number: int, why: UserError) -> None:
        """A job has no outcome because the disk cannot be written: it is to be run again when that is mended."""
        self._jobs.pop(number)
        self._disk = self._disk or why

    def _overdue(self, number: int, running: _Running, now: float) -> None:
        if running.pid is None:
            self._end(grace=0)
            self._lose_jobs(f"the worker did not start the job within {START_SECONDS:g} s and was killed")
        elif running.stage == "running":
            _kill(running.pid, signal.SIGTERM)
            running.stage, running.deadline = "terminated", now + TERM_SECONDS
        elif running.stage == "terminated":
            _kill(running.pid, signal.SIGKILL)
            running.stage, running.deadline = "killed", now + KILL_SECONDS
        else:
            # Not even SIGKILL ended it (a driver call that hangs), so the job is given up.
            self._finish(number, "timeout", _timeout(running))

    def _finish(
        self,
        number: int,
        status: Status,
        status_detail: dict[str, Any],
        metrics: dict[str, Metric] | None = None,
        observed: dict[str, Any] | None = None,
        lost: bool = False,
    ) -> None:
        running = self._jobs.pop(number)
        running.job.result.unlink(missing_ok=True)
        logs.shorten(running.job.log)
        wall_s = time.monotonic() - running.start
        self._ended.append(
            Outcome(
                running.job,
                status,
                status_detail,
                metrics or {},
                observed or {},
                running.pid,
                in_utc(running.started),
                in_utc(running.started + timedelta(seconds=wall_s)),
                wall_s,
                lost=lost,
            )
        )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


_PIDS = 2**22  # process ids on Linux are below this number (proc(5), pid_max)
# What events of the worker have beside their name, and of which type.
_EVENTS: dict[str, dict[str, type]] = {
    "ready": {"facts": dict},
    "broken": {"message": str},
    "started": {"id": int, "pid": int},
    "exited": {"id": int, "code": int},
    "progress": {"text": str},
    "result": {"content": dict},
}


def parsed_event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None for any other text (a library that writes to the pipe must not end the sweep)."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fields = _EVENTS.get(str(event.get("event"))) if isinstance(event, dict) else None
    if fields is None or any(type(event.get(name)) is not kind for name, kind in fields.items()):
        return None
    # The groups 0 and 1 are the runner's own, and everybody's.
    return None if event["event"] == "started" and not 1 < event["pid"] < _PIDS else event


def _timeout(running: _Running) -> dict[str, Any]:
    return {"type": "Timeout", "message": f"took longer than {running.job.timeout:g} s and was killed"}


def _kill(pid: int | None, number: signal.Signals) -> None:
    if pid is None:
        return
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        # It ended by itself in the meantime.
        return


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def in_utc(moment: datetime) -> str:
    """The moment in UTC and the format of RFC 3339, to the millisecond."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_now() -> str:
    """The time now, in UTC and the format of RFC 3339."""
    return in_utc(datetime.now(UTC))
