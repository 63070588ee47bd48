"""The file in which a process of the worker leaves its result, read by the parent process."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from meftbench.documents import json_object_of
from meftbench.errors import UserError
from meftbench.records.record import Metric

ROOM = 64 * 2**10  # bytes; a result file takes less
# What the system (errno.ENOSPC, EDQUOT) says of a full disk, which may be another than that of the run.
_FULL = re.compile(r"No space left on device|Disk quota exceeded")
# What else is said of a file that cannot be written.
_UNWRITABLE = re.compile(r"Input/output error|Read-only file system|Permission denied|cannot be written")


def read_result(file: Path) -> dict[str, Any] | str:
    """The content of a result file, with its metrics as `Metric`; or, where it cannot be read, the reason as text."""
    if not os.path.lexists(file):
        return "the process left no result"
    try:
        content = json_object_of(file)
        answer = content["answer"]
        metrics = {name: Metric.from_json(metric) for name, metric in answer.get("metrics", {}).items()}
        if content["status"] not in ("ok", "oom", "error", "skipped"):
            raise ValueError(f"status {content['status']!r}")
        detail, observed = dict(content["status_detail"]), dict(answer.get("observed", {}))
        return {"status": content["status"], "status_detail": detail, "metrics": metrics, "observed": observed}
    except UserError as error:
        return f"the process left an unreadable result, which {error.what}"
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


def is_of_disk(message: str, run_folder: Path) -> bool:
    """Whether the message of a cell's error says that the folder of the run cannot be written, or that a disk is full
    where that of the run is full."""
    full = bool(_FULL.search(message))
    folders = "|".join(re.escape(str(folder)) for folder in (run_folder.absolute(), run_folder.resolve()))
    if re.search(rf"(?:{folders})(?![^/'\":;,\s])", message):  # no longer name of another folder
        return full or bool(_UNWRITABLE.search(message))
    return full and disk_error(run_folder) is not None
