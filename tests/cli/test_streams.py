"""Standard output of any encoding, closed, full, or a pipe that ends: the numbers, or one line; the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.cli import streams

RUN = Path(__file__).parents[2] / "reports" / "minilm-cpu"
COMMAND = [sys.executable, "-m", "meftbench"]
ENCODINGS = ["ascii", "cp437", "cp1252", "latin-1", "koi8-r", "utf-8", "utf-16"]


def run(*arguments, encoding="utf-8", **options):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    return subprocess.run([*COMMAND, *arguments], env=environment, stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_in_any_encoding(encoding):
    """Signs that it lacks are spelled out."""
    done = run("show", str(RUN), encoding=encoding, stdout=subprocess.PIPE)

    assert (0, b"") == (done.returncode, done.stderr)
    shown = done.stdout.decode(encoding)
    assert "8 × 128" in shown or "8 x 128" in shown
    assert "meft1-exact" in shown


def test_json_in_ascii_is_json():
    records = [
        json.loads(line)
        for line in run("show", str(RUN), "--json", encoding="ascii", stdout=subprocess.PIPE).stdout.splitlines()
    ]

    assert records
    assert all("cell" in record for record in records)


@pytest.mark.parametrize(
    "arguments", [("show", str(RUN)), ("show", str(RUN), "--json"), ("list", "methods"), ("--help",)]
)
def test_a_reader_that_goes_is_no_error(arguments):
    """`| head -1` would otherwise exit with 1, which means over budget."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = run(*arguments, stdout=write)
    finally:
        os.close(write)

    assert (0, b"") == (done.returncode, done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [("show", str(RUN)), ("show", str(RUN), "--json"), ("list", "methods")])
def test_a_full_disk_is_a_line(arguments):
    with Path("/dev/full").open("w") as full:
        done = run(*arguments, stdout=full)

    assert 2 == done.returncode
    assert done.stderr.decode().splitlines() == [
        "meftbench: output cannot be written (No space left on device); make room, or send it elsewhere"
    ]


def test_a_closed_output_is_no_error():
    shell = f"{sys.executable} -m meftbench list methods >&-"

    assert 0 == subprocess.run(shell, shell=True, check=False).returncode


@given(st.text(), st.sampled_from(ENCODINGS))
def test_any_text_is_encoded(text, encoding):
    """What an encoding lacks is spelled out, or escaped as JSON has it."""
    streams.encode_anything()
    written = text.encode(encoding, "meftbench").decode(encoding)

    assert len(written) >= len(text)
    assert json.loads(json.dumps(text, ensure_ascii=False).encode("ascii", "meftbench")) is not None
