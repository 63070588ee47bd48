"""Benchmarks of the command line; time is recorded, never asserted."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"]], ids=" ".join)
def test_the_command_line_answers(benchmark, arguments):
    """Benchmark a whole process, from the start of the interpreter to its end."""
    ended = benchmark(subprocess.run, [sys.executable, "-m", "meftbench", *arguments], capture_output=True)

    assert 0 == ended.returncode
    assert b"meftbench" in ended.stdout or b"meft1" in ended.stdout
