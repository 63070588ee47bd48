"""Data read once before a run, in a process of its own: `python -m meftbench.tasks.check` (runner/data_check.py).

In, on standard input: a JSON list of {"task", "data", "train_examples", "evaluation_examples"}.
Out, on standard output: a JSON list of {"digest"} or {"error": [where, what, cure]}, one each in the same order.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from meftbench.catalogue.tasks import find_task
from meftbench.errors import UserError
from meftbench.tasks.data import load_splits


def read(asked: dict[str, Any]) -> dict[str, Any]:
    """What becomes of reading one task's data as a cell will read them."""
    limits = {name: asked[name] for name in ("train_examples", "evaluation_examples")}
    try:
        task = find_task(asked["task"], asked["task"])
        return {"digest": load_splits(task, asked["data"], **limits).digest}
    except UserError as error:
        return {"error": [error.where, error.what, error.cure]}


if __name__ == "__main__":
    json.dump([read(asked) for asked in json.load(sys.stdin)], sys.stdout)
