"""The GPU campaign, in miniature on the CPU."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest

from meftbench.records.store import load_run

SCRIPT = Path(__file__).resolve().parents[1] / "reports" / "campaigns" / "sweep_bert_base.py"
MINIATURE = """\
schema: 1
name: miniature
protocol: {warmup: 1, steps: 1, passes: [memory]}
grid:
  model: {name: bert-tiny@random, config: {attention_probs_dropout_prob: 0.0}}
  method: [lora, meft1]
  batch_size: [1, 2]
  sequence_length: 16
"""


@pytest.fixture
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_the_campaign_in_miniature(tmp_path, main, capsys):
    """Both precisions are run and reported, and the count is held against the other run cell by cell."""
    suite = tmp_path / "miniature.yaml"
    suite.write_text(MINIATURE)
    out = tmp_path / "out"

    assert 0 == main([str(out), "--suite", str(suite), "--device", "counted", "--counted-tokens", "16"])

    for precision in ("fp32", "bf16-autocast"):
        assert 4 == len(load_run(out / precision).records)
        assert {precision} == {record.cell["precision"] for record in load_run(out / precision).records}
        assert (out / precision / "report.html").is_file()
    table = pd.read_csv(out / "counted-against-measured.csv")
    assert {"activation_peak_bytes", "saved_bytes", "peak_allocated_bytes"} == set(table.metric)
    assert 2 * 3 == len(table)  # two methods at 16 tokens, three metrics
    assert (table.ratio == 1).all()  # here both sides are the same count
    assert "median error 0.00%" in capsys.readouterr().out


def test_without_a_gpu_the_campaign_says_so(tmp_path, main, capsys, monkeypatch):
    """Exit code 4 and one line, nothing written."""
    monkeypatch.setattr("pynvml.nvmlInit", _no_driver)

    assert 4 == main([str(tmp_path / "out")])

    assert not (tmp_path / "out").exists()
    assert 1 == len(capsys.readouterr().err.strip().splitlines())


def _no_driver():
    import pynvml

    raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
