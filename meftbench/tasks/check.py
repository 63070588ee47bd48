"""Reads data once before a run, in a separate process: `python -m meftbench.tasks.check` (runner/data_check.py).

In, on standard input: a JSON list of {"task", "data", "train_examples", "evaluation_examples"}.
Out, on standard output: a JSON list of {"digest"} or {"error": [where, what, cure]}, one for each request, in order.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from meftbench.catalogue.tasks import find_task
from meftbench.errors import UserError
from meftbench.tasks.data import load_splits


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Read one task's data as a cell will read them: the digest of the data, or the error."""
    limits = {name: request[name] for name in ("train_examples", "evaluation_examples")}
    try:
        task = find_task(request["task"], request["task"])
        return {"digest": load_splits(task, request["data"], **limits).digest}
    except UserError as error:
        return {"error": [error.where, error.what, error.cure]}


if __name__ == "__main__":
    json.dump([read(request) for request in json.load(sys.stdin)], sys.stdout)
