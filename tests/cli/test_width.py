"""Help and outputs fit 80 columns, and what goes into a pipe has neither colours nor hyperlinks."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from meftbench.catalogue.methods import METHODS
from meftbench.cli import app, options
from meftbench.cli.listing import Kind
from snapshots import a_step, written

REPORTS = Path(__file__).resolve().parents[2] / "reports"
VERBS = list(typer.main.get_command(app).commands)
OUTPUTS = [
    *[("list", str(kind)) for kind in Kind if kind is not Kind.schema],
    *[("show", str(REPORTS / name)) for name in ("minilm-cpu", "smollm2-cpu", "best-levers", "quality-minilm")],
    ("show", str(REPORTS / "minilm-cpu"), "*lora/b8/s128"),
    ("doctor",),
    ("validate", "--published"),
    ("inspect", "snapshot.pickle", "-q"),
    ("run", "smoke", "--dry-run"),
]
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])\b[0-9;]*m")


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    written(tmp_path, a_step())


def too_wide(text, width=80):
    return [line for line in text.splitlines() if len(line.rstrip()) > width]


@pytest.mark.parametrize("command", [(), *((verb,) for verb in VERBS)], ids=" ".join)
def test_help_fits(cli, command):
    code, out, _ = cli(*command, "--help")

    assert code == 0
    assert "Usage: meftbench" in out
    assert too_wide(out) == []
    assert ESCAPE not in out


@pytest.mark.parametrize("command", OUTPUTS, ids=lambda command: " ".join(map(os.path.basename, command)))
def test_an_output_fits(cli, monkeypatch, command):
    """As at a terminal; but a path, a label and what is to be typed are never broken."""
    monkeypatch.setattr(options, "at_terminal", lambda: True)
    monkeypatch.setattr("meftbench.cli.run.at_terminal", lambda: True)
    code, out, _ = cli(*command)
    whole = [
        line for line in too_wide(out) if len(line.split()) > 1 and not re.search(r"/b\d+/s\d+|^  bert-tiny", line)
    ]

    assert code == 0
    assert whole == []


@pytest.mark.parametrize("command", OUTPUTS, ids=lambda command: " ".join(map(os.path.basename, command)))
def test_a_pipe_has_no_colours_and_no_links(cli, command):
    assert ESCAPE not in "".join(cli(*command)[1:])


def at_a_terminal(*command, **variables):
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "meftbench", *command],
        **{
            "stdin": slave,
            "stdout": slave,
            "stderr": slave,
            "env": environment | {"TERM": "xterm-256color"} | variables,
        },
    )
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_no_color_is_honoured():
    """A terminal may have bold letters, and with NO_COLOR no colours."""
    assert ESCAPE in at_a_terminal("run", "--help", NO_COLOR="1")
    for command in (("run", "--help"), ("list", "methods"), ("show", str(REPORTS / "minilm-cpu"))):
        assert not COLOUR.search(at_a_terminal(*command, NO_COLOR="1"))


def test_a_terminal_is_told_what_to_type_next():
    assert at_a_terminal("list", "methods").rstrip().endswith("next: meftbench estimate MODEL METHOD")


def test_a_name_begins_its_line(cli):
    """So that it is found by grep, however wide the terminal."""
    lines = cli("list", "methods")[1].splitlines()

    assert {*METHODS} <= {line.split()[0] for line in lines if not line.startswith(" ")}
