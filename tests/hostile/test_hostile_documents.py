"""Files that people write, mutated: suites, budgets, profiles and tasks are read or refused, and nothing more."""

from __future__ import annotations

import datetime
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from meftbench.catalogue.profiles import find_device
from meftbench.catalogue.task import own_task
from meftbench.errors import UserError
from meftbench.plan.budgets import load_budgets
from meftbench.plan.prices import price_of
from meftbench.plan.suite import load_suite
from mutations import SUITE, command, hostile, mutated, refused_or, watched

REPOSITORY = Path(__file__).resolve().parents[2]


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
PRICES = {
    "schema": 1,
    "cards": {"h100": {"per_hour": 2.5, "currency": "USD"}, "a100-80gb": {"per_hour": 1.5, "currency": "EUR"}},
}
PROFILE = yaml.safe_load((REPOSITORY / "meftbench/catalogue/profiles/h100.yaml").read_text())
CPU_PROFILE = {name: PROFILE[name] for name in ("schema", "name", "device", "memory_bytes")} | {
    "kind": "cpu",
    "speeds": PROFILE["speeds"],
}


@hostile("suite")
@given(content=st.sampled_from([SUITE, TRAINING]).flatmap(mutated))
def test_a_suite_is_read_or_refused(tmp_path, content):
    """With its cells, their labels and identities."""
    (tmp_path / "suite.yaml").write_bytes(content)

    with watched(tmp_path):
        suite = refused_or(load_suite, str(tmp_path / "suite.yaml"))
        if not isinstance(suite, UserError):
            assert all(cell.cell_id and cell.label for cell in suite.cells)


@hostile("suite, listed by the command")
@given(content=mutated(SUITE, damaged=False))
def test_a_dry_run_of_a_suite_lists_it_or_refuses_it(tmp_path, content):
    """In one line on stderr."""
    (tmp_path / "suite.yaml").write_bytes(content)

    with watched(tmp_path):
        code, _, err = command("run", tmp_path / "suite.yaml", "--dry-run")

    assert code in (0, 2)
    assert code == 0 or 1 == err.count("\n")


@hostile("budgets")
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


@hostile("profile of a GPU")
@given(content=mutated(PROFILE))
def test_a_profile_is_read_or_refused(tmp_path, content):
    (tmp_path / "gpu.yaml").write_bytes(content)

    with watched(tmp_path):
        refused_or(find_device, str(tmp_path / "gpu.yaml"))


@hostile("profile of a CPU")
@given(content=mutated(CPU_PROFILE))
def test_a_profile_of_a_cpu_is_read_or_refused(tmp_path, content):
    (tmp_path / "cpu.yaml").write_bytes(content)

    with watched(tmp_path):
        refused_or(find_device, str(tmp_path / "cpu.yaml"))


@hostile("price list")
@given(content=mutated(PRICES))
def test_a_price_list_is_read_or_refused(tmp_path, content):
    """A price that was read can be told for a million tokens."""
    (tmp_path / "prices.yaml").write_bytes(content)

    with watched(tmp_path):
        price = refused_or(price_of, tmp_path / "prices.yaml", "h100")
        if not isinstance(price, UserError):
            assert price.per_million_tokens(1000.0) > 0


@hostile("task")
@given(content=mutated(TASK))
def test_a_task_is_read_or_refused(tmp_path, content):
    (tmp_path / "task.yaml").write_bytes(content)

    with watched(tmp_path):
        refused_or(own_task, "here", tmp_path)
