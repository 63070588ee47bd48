"""The file in which a process of the worker leaves its result, read by the parent process."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from meftbench.records.record import Metric

ROOM = 64 * 2**10  # bytes; a result file takes less
# Messages of the system (errno.ENOSPC, EDQUOT) that name a full disk, wherever it is.
_FULL = re.compile(r"No space left on device|Disk quota exceeded")
# Others of a disk that cannot be written. They may be about files that a cell merely reads, unless they name the run.
_UNWRITABLE = re.compile(r"Input/output error|Read-only file system|Permission denied|cannot be written")


def read_result(file: Path) -> dict[str, Any] | str:
    """The content of a result file, with its metrics as `Metric`; or, where it cannot be read, the reason as text."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        answer = content["answer"]
        metrics = {name: Metric.from_json(metric) for name, metric in answer.get("metrics", {}).items()}
        if content["status"] not in ("ok", "oom", "error", "skipped"):
            raise ValueError(f"status {content['status']!r}")
        detail, observed = dict(content["status_detail"]), dict(answer.get("observed", {}))
        return {"status": content["status"], "status_detail": detail, "metrics": metrics, "observed": observed}
    except FileNotFoundError:
        return "the process left no result"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the process left an unreadable result, {type(error).__name__}: {error}"


def disk_error(folder: Path) -> OSError | None:
    """The error with which the size of a result cannot be written to `folder` now; None: it can. Leaves no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(os.urandom(ROOM))  # which no file system compresses
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error
    return None


def names_disk(message: str, run_folder: Path) -> bool:
    """Whether the message of a cell's error says that the disk is full, or the folder of the run cannot be written."""
    within = str(run_folder) in message or str(run_folder.resolve()) in message
    return bool(_FULL.search(message)) or (within and bool(_UNWRITABLE.search(message)))
