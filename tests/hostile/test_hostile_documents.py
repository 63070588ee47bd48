"""Files that people write, mutated: suites, budgets, profiles and tasks are read or refused, and nothing more."""

from __future__ import annotations

import datetime
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meftbench.catalogue.profiles import find_device
from meftbench.catalogue.task import own_task
from meftbench.errors import UserError
from meftbench.plan.suite import load_suite
from meftbench.verdicts.budgets import load_budgets
from mutations import EXAMPLES, SUITE, command, mutated, refused_or, watched

REPOSITORY = Path(__file__).resolve().parents[2]
often = settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


TRAINING = {
    "schema": 1,
    "name": "training",
    "tasks": ["rte", {"name": "mrpc", "sequence_length": 32}],
    "training": {"epochs": 1, "learning_rate": [1.0e-4, 1.0e-3]},
    "grid": {"model": "bert-tiny@random", "method": ["full", "lora"], "batch_size": 8, "sequence_length": 16},
}
BUDGETS = {
    "schema": 1,
    "default": {"tolerance": "1%", "missing": "warn"},
    "budgets": [
        {"match": "*/full/*", "metric": "peak_allocated_bytes", "max": "412MiB", "warn": "400MiB"},
        {"match": "*", "metric": "activation_peak_bytes", "max_increase": "1%", "baseline": {"a": 1, "b": 2.5}},
        {"match": "*lora*", "metric": "step_time_s", "max": 2.5, "when": {"device": "cuda"}, "environment": "h100*"},
        {"match": "a*", "metric": "saved_bytes", "max": 1, "reason": "known", "expires": datetime.date(2026, 12, 31)},
    ],
}
TASK = {
    "kind": "choices",
    "texts": ["q"],
    "label": "answer",
    "choices": ["a", "b"],
    "template": "{q}",
    "licence": "MIT",
}
PROFILE = yaml.safe_load((REPOSITORY / "meftbench/catalogue/profiles/h100.yaml").read_text())


@often
@given(content=st.sampled_from([SUITE, TRAINING]).flatmap(mutated))
def test_a_suite_is_read_or_refused(tmp_path, content):
    """With its cells, their labels and identities."""
    (tmp_path / "suite.yaml").write_bytes(content)

    with watched(tmp_path):
        suite = refused_or(load_suite, str(tmp_path / "suite.yaml"))
        if not isinstance(suite, UserError):
            assert all(cell.cell_id and cell.label for cell in suite.cells)


@often
@given(content=mutated(SUITE, damaged=False))
def test_a_dry_run_of_a_suite_lists_it_or_refuses_it(tmp_path, content):
    """In one line on stderr."""
    (tmp_path / "suite.yaml").write_bytes(content)

    with watched(tmp_path):
        code, _, err = command("run", tmp_path / "suite.yaml", "--dry-run")

    assert code in (0, 2)
    assert code == 0 or 1 == err.count("\n")


@often
@given(content=mutated(BUDGETS))
def test_budgets_are_read_or_refused(tmp_path, content):
    """And match labels in no time."""
    (tmp_path / "budgets.yaml").write_bytes(content)

    with watched(tmp_path):
        budgets = refused_or(load_budgets, tmp_path / "budgets.yaml")
        if not isinstance(budgets, UserError):
            assert budgets.rows
            for row in budgets.rows:
                row._pattern.fullmatch("bert-base@random/full/b8/s128" * 30)


@often
@given(content=mutated(PROFILE))
def test_a_profile_is_read_or_refused(tmp_path, content):
    (tmp_path / "gpu.yaml").write_bytes(content)

    with watched(tmp_path):
        refused_or(find_device, str(tmp_path / "gpu.yaml"))


@often
@given(content=mutated(TASK))
def test_a_task_is_read_or_refused(tmp_path, content):
    (tmp_path / "task.yaml").write_bytes(content)

    with watched(tmp_path):
        refused_or(own_task, "here", tmp_path)
