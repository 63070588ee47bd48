"""The examples run as they are, from a clone, and say what they are to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train", "loaded again, its logits are the same, bit for bit"),
        ("trainer", "8 steps"),
        ("own_stack", "24 layers: gradients differ by"),
    ],
)
def test_a_script_runs(tmp_path, name, said):
    """In a folder of its own, into which it writes nothing."""
    out = run(tmp_path, str(ROOT / "examples" / f"{name}.py"))

    assert said in out
    assert [] == list(tmp_path.iterdir())
    if name == "own_stack":
        assert float(out.split("differ by ")[1].split()[0]) < 1e-5


@pytest.mark.slow
def test_the_gate_holds_and_fails_by_a_byte(tmp_path):
    """The budgets are what is counted, to the byte: one byte less is exceeded, exit 1."""
    example = ROOT / "examples" / "ci"
    run(tmp_path, "-m", "meftbench", "run", str(example / "suite.yaml"), "--out", "run", "--quiet")
    assert "4 held" in run(tmp_path, "-m", "meftbench", "check", "run")

    budgets = (example / "budgets.yaml").read_text()
    largest = max(int(line.rpartition("max: ")[2].rstrip("}")) for line in budgets.splitlines() if "max: " in line)
    (tmp_path / "less.yaml").write_text(budgets.replace(f"max: {largest}", f"max: {largest - 1}"))
    with pytest.raises(AssertionError, match=r"1 held|exceeded|over"):
        run(tmp_path, "-m", "meftbench", "check", "run", "--budget", "less.yaml")
