"""Ctrl-C while something is predicted, and disks that take nothing: one line, the right exit code, nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sweeps import wait_until

SHAPE = ("--batch-size", "2", "--sequence-length", "16")
VERBS = {
    "estimate": ("estimate", "bert-tiny@random", "lora", *SHAPE),
    "fit": ("fit", "bert-tiny@random", "--methods", "full,lora", "--memory", "8GiB", "--jobs", "2"),
    "export": ("export", "bert-tiny@random", "lora", *SHAPE, "-o", "a.pickle"),
}


def marked(mark):
    """Processes that live and were started with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ended = (folder / "stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
            if not ended and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue  # it has ended while it was looked at
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_ends_the_verb_and_its_processes(verb, tmp_path):
    """130 and one line; the process that predicts is gone, and those it has started."""
    mark = f"mark-{uuid.uuid4()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "meftbench", *VERBS[verb], "-q"],
        env=os.environ | {"MEFTBENCH_TEST_MARK": mark},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As at a terminal, also where the tests were started in the background, whose children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: len(marked(mark)) > 1)  # the one that predicts is there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()

    *notes, last = err.splitlines()
    assert (130, "", "meftbench: interrupted") == (process.returncode, out, last)
    assert all(note.startswith("note: results kept: ") for note in notes), err  # of a search, also with -q
    wait_until(lambda: marked(mark) == [])
    assert not (tmp_path / "a.pickle").exists()


@pytest.mark.parametrize("folder", ["file/inside", "/dev/full/inside"])
def test_fits_folder_must_be_one(cli, tmp_path, monkeypatch, folder):
    """Said before minutes of predicting, not after."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("meftbench.runner.predictions.ask", _never)

    code, out, err = cli("fit", "bert-tiny@random", "--methods", "full", "--memory", "8GiB", "--out", folder)

    assert (2, "", 1) == (code, out, len(err.splitlines()))
    assert "cannot be written" in err
    assert "--out" in err


def _never(*_):
    raise AssertionError("nothing is to be predicted")
