"""Every measured run that is committed below reports/, predicted again: no change of a rule goes unseen.

Of each run a few cells, evenly spread; `reports/campaigns/prediction.py` predicts all of them.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from builders import a_record, a_run, measured
from meftbench.records.store import load_run
from meftbench.verdicts.validation import METRICS, measured_records, profile_of, validate

REPORTS = Path(__file__).resolve().parents[1] / "reports"
LIMITS = runpy.run_path(str(REPORTS / "campaigns" / "prediction.py"))["LIMITS"]
CELLS = 8


def measured_runs(root):
    """Folders below `root` of runs that have peaks a CUDA allocator measured."""
    folders = sorted(file.parent for file in root.rglob("records.jsonl"))
    return [folder for folder in folders if any(_on_cuda(record) for record in load_run(folder).records)]


def _on_cuda(record):
    taken = [record.metrics[name] for name in METRICS if name in record.metrics]
    return record.cell["device"] == "cuda" and any(metric.source == "measured" for metric in taken)


def a_gpus_run(folder, peak, name="Tesla T4"):
    cell = {"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16, "method": "lora", "device": "cuda"}
    record = a_record(metrics={name: measured(peak) for name in METRICS}, **cell)
    return a_run(folder, record, environment={"gpus": {"devices": [{"name": name}]}})


def test_measured_runs_are_found_and_counted_ones_are_not(tmp_path):
    """At any depth; of those that are committed, each has a profile and cells to predict."""
    a_gpus_run(tmp_path / "reports" / "deep" / "gpu", 10**6)
    a_run(tmp_path / "reports" / "cpu", a_record(metrics={"peak_allocated_bytes": 1}))
    a_run(tmp_path / "reports" / "failed", a_record("oom", device="cuda"))

    assert [tmp_path / "reports" / "deep" / "gpu"] == measured_runs(tmp_path)
    for folder in measured_runs(REPORTS):
        run = load_run(folder)
        assert measured_records(run)
        assert profile_of(run).name


@pytest.mark.parametrize("folder", measured_runs(REPORTS), ids=lambda folder: str(folder.relative_to(REPORTS)))
def test_it_is_predicted_within_the_limits(folder):
    """Each number that has a limit, by the worst that it allows."""
    run = load_run(folder)

    found = validate(run, profile_of(run).name, most=CELLS)

    off = {error.label: error.share for error in found.errors if abs(error.share) > LIMITS.get(error.metric, (0, 9))[1]}
    assert {} == off
    assert found.errors
