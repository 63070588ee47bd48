"""The file in which a process of the worker leaves its result, read by the parent process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from meftbench.records.record import Metric
from meftbench.units import format_bytes

ROOM = 64 * 2**10  # bytes; a result file takes less


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
        free = shutil.disk_usage(file.parent).free
        disk_full = f": the disk that the run is written to is full ({format_bytes(free)} free)" if free < ROOM else ""
        return f"the process left no result{disk_full}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the process left an unreadable result, {type(error).__name__}: {error}"
