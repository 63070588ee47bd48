"""Sends one request to a worker process (meftbench.worker) that is started for it, and returns the answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from meftbench.errors import CELLS_FAILED, UserError
from meftbench.plan.factories import FOLDER
from meftbench.plan.protocol import Protocol
from meftbench.runner.oom_kills import of_kill, oom_kills
from meftbench.runner.process import parsed_event, worker_environment

# Named and not imported here, since it imports torch.
ONCE = (sys.executable, "-m", "meftbench.worker", "--once")
_LOG_BYTES = 4000  # of what a worker has printed that a message quotes


def ask(
    verb: str,
    request: Mapping[str, Any],
    tell: Callable[[str], None] = lambda line: None,
    allow_code: bool = False,
    requests: str | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """The answer to `request`, as meftbench.measuring.requests defines it for `verb`.

    tell: called with lines of progress.  allow_code: whether the user's own code (models, batches) may be imported.
    requests: another module that defines verbs, such as one that needs no torch.  threads: of the CPU.

    Raises UserError: the one that the worker raised; RuntimeError, with its traceback or the end of its log: it failed
    in another way.
    """
    environment = worker_environment(Protocol(), threads, os.environ)
    if allow_code:
        environment[FOLDER] = os.getcwd()
    job = {"id": 1, "verb": verb, "request": request, "result": None, "log": None, "threads": threads}
    job |= {"memory_bytes": None, "environment": {}, "ends_with_asker": True}
    content = _result_of(job, environment, tell, () if requests is None else ("--requests", requests))
    if "user_error" in content:
        raise UserError(**content["user_error"])
    if content["status"] != "ok":
        detail = content["status_detail"]
        raise RuntimeError(f"the prediction ended with {detail['type']}:\n{detail.get('traceback', detail['message'])}")
    return dict(content["answer"])


def _result_of(
    job: dict[str, Any], environment: dict[str, str], tell: Callable[[str], None], options: tuple[str, ...]
) -> dict[str, Any]:
    """The result of a job, as soon as the worker reports it; the worker, and whatever it still runs, is then killed.

    Raises RuntimeError, with the end of its log: the worker ended without a result. UserError: it was killed.
    """
    with tempfile.TemporaryFile() as log:  # without a name, so that nothing is left of it however this process ends
        kills = oom_kills()
        # A session of its own, so that the processes it starts can be ended with it.
        process = subprocess.Popen(
            (*ONCE, *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # the process has died; its log says why
                # The pipe is left open: when it closes, however this process ends, the worker ends as well.
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                event = parsed_event(line) or {}
                if event.get("event") == "progress":
                    tell(event["text"])
                elif event.get("event") == "result":
                    return dict(event["content"])
            code = process.wait()
            if code < 0:
                for_memory, why = of_kill(kills) if code == -signal.SIGKILL else (False, "")
                what = f"its process was ended by signal {-code}, {signal.Signals(-code).name}{why and f': {why}'}"
                cure = "free memory of the host and try again" if for_memory else "try again"
                raise UserError(job["verb"], what, cure, CELLS_FAILED)
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_BYTES))
            end = log.read().decode(errors="replace")
            raise RuntimeError(f"the prediction ended with {code}:\n{end}")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()
