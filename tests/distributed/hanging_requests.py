"""Stands in for meftbench.measuring.requests: every rank of a distributed cell tells its process id, and then hangs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from meftbench.measuring import ranks
from meftbench.plan.cell import Cell


def hang(*_: Any) -> None:
    with Path(os.environ["RANKS_TOLD"]).open("a") as told:
        told.write(f"rank {os.getpid()}\n")
    time.sleep(600)


def measure(request: dict[str, Any], _tell: Any) -> dict[str, Any]:
    ranks.run_passes = hang
    cell = Cell.model_validate_json(json.dumps(request["cell"]))
    ranks.run_ranks(cell, None, "cpu")
    return {}


VERBS = {"measure": measure}


def describe() -> dict[str, Any]:
    return {}
