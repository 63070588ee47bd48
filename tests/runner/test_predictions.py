"""A prediction runs in a process of its own, which ends with whoever asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

ASK = """
import sys
from meftbench.runner import predictions
told = predictions.subprocess.Popen
def start(*args, **kwargs):
    process = told(*args, **kwargs)
    print(process.pid, flush=True)
    return process
predictions.subprocess.Popen = start
predictions.ask("estimate", {request})
"""


def test_it_ends_with_a_parent_that_is_killed():
    """kill -9 of the parent leaves no prediction behind, whatever that is doing."""
    cell = {"model": "opt-6.7b@random", "method": "full", "batch_size": 1, "micro_batch_size": 1, "sequence_length": 8}
    request = {"cell": cell, "profile": "h100", "allocator": ""}
    parent = subprocess.Popen(
        [sys.executable, "-c", ASK.replace("{request}", json.dumps(request))], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it is there

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    deadline = time.monotonic() + 60
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)

    assert not _runs(child), "the prediction outlived who asked for it"


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
