"""A prediction runs in a process of its own, which ends with whoever asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import meftbench
from meftbench.errors import UserError
from meftbench.worker import failure

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


ENDLESS = """
import threading, time
from transformers import BertConfig, BertForSequenceClassification


def build():
    threading.Thread(target=time.sleep, args=(600,)).start()
    return BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


def refuse():
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise ValueError("not today")
"""


@pytest.mark.parametrize(("function", "said"), [("build", None), ("refuse", "not today")])
def test_the_answer_does_not_wait_for_what_code_of_the_user_leaves_running(function, said, tmp_path, monkeypatch):
    """A thread that goes on would keep the interpreter of the prediction from its end; nothing is left of either."""
    (tmp_path / "lasting.py").write_text(ENDLESS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def asked():
        shape = {"batch_size": 1, "sequence_length": 8}
        return meftbench.estimate(f"lasting:{function}", "full", **shape, allow_code=True)

    if said is None:
        assert asked().fits
    else:
        with pytest.raises(UserError, match=said):
            asked()
    assert [] == [*(tmp_path / "temporary").glob("meftbench-*")]


def test_an_error_of_any_texts_is_an_answer():
    """What a pass or a function of the user's own raises may hold more than text."""
    error = failure(UserError(Path("here"), ValueError("what"), 3))

    assert {"where": "here", "what": "what", "cure": "3", "exit_code": 2} == json.loads(json.dumps(error))["user_error"]
