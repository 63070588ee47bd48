"""Runs jobs that need torch in processes of their own: each job writes its result to a file, errors included.

`python -m meftbench.worker` is a fork server. It imports torch, transformers and peft once, without initialising
CUDA, and forks a new child for each job: each cell has a process of its own, without seconds of imports. A child leads
its own process group, so that killing the group of a cell also kills what the cell has started. With `--once` it runs
one job, the first line of stdin, in its own process.

Input, one line of JSON for each job:
    {"id", "verb", "request", "result", "log", "threads", "memory_bytes", "environment", "ends_with_asker"}
    `verb` and `request` are those of meftbench.measuring.requests. With `ends_with_asker` a job of `--once` is
    killed, with all that it has started, at the end of stdin, as all jobs of the server are.
Output, one line of JSON for each event:
    {"event": "ready", "facts"} once, or {"event": "broken", "message"}; then for each job
    {"event": "started", "id", "pid"} and {"event": "exited", "id", "pid", "code"} (Popen.returncode: -9 for SIGKILL).
    With `--once`: {"event": "progress", "text"}, and {"event": "result", "content"} if the job names no file for it.
A result has {"status", "status_detail", "answer"}, of a UserError {"user_error"} as well; its file is written
completely or not at all. At the end of stdin, however the runner ended, every child is killed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from meftbench.errors import RESULT_NOT_WRITTEN, CellFailure, UserError, is_out_of_memory
from meftbench.kept_output import KeptOutput
from meftbench.memory_limit import memory_limit
from meftbench.records.store import replace_file
from meftbench.units import requested_bytes

REQUESTS = "meftbench.measuring.requests"
TRACEBACK_CHARACTERS = 8_000
MESSAGE_CHARACTERS = 2_000
_PLACE = re.compile(r'File "/[^"\n]*?/((?:site-packages|meftbench|python3\.\d+)/(?!.*site-packages)[^"\n]*)"')

Tell = Callable[[str], None]


class NotWritten(Exception):  # noqa: N818 - no error of the job
    """The result of a job cannot be written to its file."""


def imported(name: str) -> ModuleType:
    """The module `name`, imported without garbage collection, which goes through torch and transformers many times as
    they are imported: a quarter of the time. What is imported is exempt from collections afterwards."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()
        gc.freeze()


# --- one job ---


def run_job(
    requests: ModuleType, verb: str, request: dict[str, Any], tell: Tell, memory_bytes: int | None = None
) -> dict[str, Any]:
    """The content of the result file for a request, whatever is raised.

    requests: has `VERBS`: by name, functions of a request and of a function that takes lines of progress.
    memory_bytes: that it may take; None: no limit.
    """
    limit = memory_limit(memory_bytes)
    try:
        with limit:
            content = {"status": "ok", "status_detail": {}, "answer": requests.VERBS[verb](request, tell)}
        json.dumps(content, allow_nan=False)
        return content
    # Every exception is caught: if the process ended here without a result, the cell would have no record. What says so
    # needs memory, too, so that the limit ends before.
    except BaseException as error:
        if isinstance(error, SystemError) and limit.exhausted:
            # A function of C has lost the MemoryError ("returned NULL without setting an exception"; ABCMeta of 3.11).
            return failure(MemoryError(str(error)))
        return failure(error)


def _without_machine(lines: str) -> str:
    """A traceback without the folders of this machine: files below the package, site-packages or Python's library."""
    return _PLACE.sub(r'File "\1"', lines)


def failure(error: BaseException) -> dict[str, Any]:
    """The content of a result file for a job that ended by `error`: `oom`, or `error` with its traceback."""
    lines = traceback.format_exception(error)
    detail: dict[str, Any] = {
        "type": type(error).__name__,
        # The text of a KeyError is the key alone.
        "message": f"{'KeyError: ' * isinstance(error, KeyError)}{error}"[:MESSAGE_CHARACTERS] or type(error).__name__,
    }
    if isinstance(error, CellFailure):
        status, detail = error.status, detail | json.loads(json.dumps(error.detail, default=str))
    elif is_out_of_memory(error):
        status = "oom"
        if (requested := requested_bytes(str(error))) is not None:
            detail["requested_bytes"] = requested
    else:
        status = "error"
    if status == "error" and not isinstance(error, UserError):
        detail.setdefault("traceback", _without_machine("".join(lines))[-TRACEBACK_CHARACTERS:])
    content = {"status": status, "status_detail": detail, "answer": {}}
    if isinstance(error, UserError):
        texts = {name: str(getattr(error, name)) for name in ("where", "what", "cure")}
        content["user_error"] = texts | {"exit_code": error.exit_code}
    return content


def _no_progress(line: str) -> None:
    """Ignores progress: a job of the server reports only its end."""


def perform(requests: ModuleType, job: dict[str, Any], tell: Tell = _no_progress) -> dict[str, Any]:
    """Run a job in this process. Returns its result, which is written to a file if the job names one.

    Raises NotWritten: the file cannot be written.
    """
    os.environ.update(job["environment"])
    _use_threads(job["threads"])
    content = run_job(requests, job["verb"], job["request"], tell, job["memory_bytes"])
    if job["result"] is not None:
        result = Path(job["result"])
        try:
            result.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed since
            replace_file(result, json.dumps(content, allow_nan=False).encode())
        except OSError as error:
            raise NotWritten(f"{result}: cannot be written ({error.strerror or error})") from error
    return content


def _use_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # meftbench.measuring.requests imports torch; a substitute in a test may not.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
        # Work for all threads, so that they are there before memory is limited: their stacks count, and libgomp ends
        # the process where it cannot make one (torch 2.13).
        torch.arange(threads << 16)


# --- the server ---


class Server:
    """Starts a process for each job, and reports its start and its end."""

    def __init__(self, name: str, fork: bool) -> None:
        # Only this process may write to the original stdout; what else is printed to fd 1 goes to stderr or a log.
        self._reports = os.dup(1)
        os.dup2(2, 1)
        self._name, self._fork = name, fork
        self._running: dict[int, int] = {}  # pid -> id of the job
        self._outputs: dict[int, KeptOutput] = {}  # pid -> what it prints
        self._unread = b""

    def serve(self) -> int:
        """Serve until the end of stdin; the exit code."""
        try:
            self._requests = imported(self._name)
            if self._fork:
                getattr(self._requests, "preload", lambda: None)()
        except Exception as error:
            traceback.print_exc()
            self._report(event="broken", message=f"{type(error).__name__}: {error}")
            return 1
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._report(event="ready", facts=self._facts())
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(0, selectors.EVENT_READ)
            self._selector.register(wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fd: key.data for key, _ in self._selector.select()}
                if wake_read in ready:
                    os.read(wake_read, 4096)
                for output in filter(None, ready.values()):
                    if not output.take():
                        self._selector.unregister(output.read_end)  # nothing prints there any more
                self._reap()
                if 0 in ready and not self._take_jobs():
                    self._kill_all()
                    return 0

    def _report(self, **event: Any) -> None:
        line = json.dumps(event, default=str).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._reports, line) :]
        except BrokenPipeError:
            # The runner has ended; so stdin will end, too, upon which the server kills its children and returns.
            return

    def _facts(self) -> dict[str, Any]:
        """What `describe` returns, called in a child: CUDA, once initialised here, would not work in later children."""
        if not self._fork:
            return dict(self._requests.describe())
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become_child(os.open(os.devnull, os.O_WRONLY))
            try:
                text = json.dumps(self._requests.describe(), default=str)
            except Exception as error:
                text = json.dumps({"absent": f"{type(error).__name__}: {error}"})
            with os.fdopen(write, "w", encoding="utf-8") as pipe:
                pipe.write(text)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return dict(json.loads(text)) if text else {"absent": "the process that was asked for them died"}

    def _take_jobs(self) -> bool:
        """Start the jobs that have arrived; False at the end of stdin."""
        received = os.read(0, 1 << 16)
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            self._start(json.loads(line))
        return bool(received)

    def _start(self, job: dict[str, Any]) -> None:
        # The child waits for a byte, or for its job, until its start is reported. If this process is killed before,
        # nobody else knows of the child; but it then finds the end of the pipe, and ends by itself.
        permit_read, permit_write = os.pipe()
        output = KeptOutput(job["log"])
        pid = self._forked(job, output, permit_read, permit_write) if self._fork else self._spawned(output, permit_read)
        output.begun()
        os.close(permit_read)
        self._running[pid], self._outputs[pid] = job["id"], output
        self._selector.register(output.read_end, selectors.EVENT_READ, output)
        self._report(event="started", id=job["id"], pid=pid)
        with suppress(BrokenPipeError):  # the child has ended, which `_reap` reports
            os.write(permit_write, b"." if self._fork else json.dumps(job).encode() + b"\n")
        os.close(permit_write)

    def _forked(self, job: dict[str, Any], output: KeptOutput, permit_read: int, permit_write: int) -> int:
        ready_read, ready_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.close(ready_write)
                os.close(ready_read)
                os.close(permit_write)
                for inherited in (output, *self._outputs.values()):
                    inherited.close()
                self._become_child(output.write_end)
                if os.read(permit_read, 1):
                    os.close(permit_read)
                    perform(self._requests, job)
                    code = 0
            except NotWritten as error:
                code = RESULT_NOT_WRITTEN
                print(error, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                # No atexit handlers and no destructors: they belong to the server.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(ready_write)
        # Returns once the child leads its own group: before that, killing the group would not reach it.
        os.read(ready_read, 1)
        os.close(ready_read)
        return pid

    def _spawned(self, output: KeptOutput, permit_read: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-m", "meftbench.worker", "--requests", self._name, "--once"],
            stdin=permit_read,
            stdout=output.write_end,
            stderr=output.write_end,
            start_new_session=True,
        )
        # `_reap` waits for it, as for the others; with a return code set, Popen does not.
        process.returncode = 0
        return process.pid

    def _become_child(self, output: int) -> None:
        """Print to the descriptor `output`, which is closed, and take signals as a new process does."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reports)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def _reap(self) -> None:
        for pid, job in list(self._running.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                continue
            # Until waitpid its id cannot be reused, so that what it has left in its group can be killed safely.
            _kill_group(pid)
            _, status = os.waitpid(pid, 0)
            del self._running[pid]
            output = self._outputs.pop(pid)
            with suppress(KeyError):  # it printed nothing more some time ago
                self._selector.unregister(output.read_end)
            output.end()
            self._report(event="exited", id=job, pid=pid, code=os.waitstatus_to_exitcode(status))

    def _kill_all(self) -> None:
        for pid in self._running:
            _kill_group(pid)
        for pid in self._running:
            os.waitpid(pid, 0)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # No process is left in the group. (macOS reports EPERM for a group of zombies.)
        return


# --- one job, in a process that was started for it ---


def run_once(name: str) -> int:
    """Run the job that is the first line of stdin; its events go to stdout. The exit code: 1 where no job came."""
    line = b""
    while not line.endswith(b"\n"):
        received = os.read(0, 1 << 16)
        if not received:
            return 1
        line += received
    job = json.loads(line)
    reports = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not mix with the events

    def report(**event: Any) -> None:
        # A broken pipe: the process that asked has ended.
        with suppress(BrokenPipeError), os.fdopen(os.dup(reports), "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(event) + "\n")

    if job["ends_with_asker"]:
        threading.Thread(target=_end_with_asker, daemon=True).start()
    try:
        content = perform(imported(name), job, lambda text: report(event="progress", text=text))
    except NotWritten as error:
        print(error, file=sys.stderr)
        return RESULT_NOT_WRITTEN
    if job["result"] is None:
        report(event="result", content=content)
    return 0


def _end_with_asker() -> None:
    """Kills this process, and those it has started, when stdin ends because the process that asked has ended."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """Serve, or with --once run one job in this process. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m meftbench.worker", description="The fork server of `meftbench run`.")
    parser.add_argument("--requests", default=REQUESTS, help="module with VERBS and describe")
    parser.add_argument("--spawn", action="store_true", help="a new interpreter for each job, instead of a fork")
    parser.add_argument("--once", action="store_true", help="run one job, which is the first line of stdin, and exit")
    options = parser.parse_args(arguments)
    if options.once:
        return run_once(options.requests)
    return Server(options.requests, fork=hasattr(os, "fork") and not options.spawn).serve()


if __name__ == "__main__":
    sys.exit(main())
