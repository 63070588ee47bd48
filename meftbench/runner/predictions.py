"""The parent's side of a prediction: meftbench.prediction.requests, which knows torch, in a process of its own."""

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

from meftbench.errors import UserError
from meftbench.plan.factories import FOLDER

# By name only: what is behind it imports torch.
PREDICTOR = (sys.executable, "-m", "meftbench.prediction.requests")
_LOG_CHARACTERS = 4000


def ask(
    request: Mapping[str, Any], tell: Callable[[str], None] = lambda line: None, allow_code: bool = False
) -> dict[str, Any]:
    """The answer to `request` (see meftbench.prediction.requests). tell: is given each line of progress.

    allow_code: whether functions of the user's own that make models and batches may be imported.

    Raises UserError as the prediction did; RuntimeError, with the end of its log, where it ended otherwise.
    """
    inherited = {name: value for name, value in os.environ.items() if name != FOLDER}
    environment = inherited | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if allow_code:
        environment[FOLDER] = os.getcwd()
    with tempfile.TemporaryFile() as log:
        # A session of its own, so that the processes it starts can be ended with it.
        process = subprocess.Popen(
            PREDICTOR,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):  # it has died: the log says of what
                # Left open: at its end, however this process ends, the other one ends as well.
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                event = json.loads(line)
                if "progress" in event:
                    tell(event["progress"])
                elif "error" in event:
                    raise UserError(**event["error"])
                else:
                    return dict(event["answer"])
            process.wait()
            log.seek(0)
            end = log.read()[-_LOG_CHARACTERS:].decode(errors="replace")
            raise RuntimeError(f"the prediction ended with {process.returncode}:\n{end}")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
            with suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
