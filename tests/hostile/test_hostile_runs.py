"""Run folders of which a file was mutated: every command that reads them answers or refuses, and nothing more."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builders import ENVIRONMENT, a_measured_cell, a_record, a_run, an_exact_cell
from meftbench.records.record import Metric
from mutations import command, hostile, mutated, watched
from scored_runs import a_score

DETAIL = {
    "type": "OutOfMemoryError",
    "message": "CUDA out of memory",
    "traceback": "Traceback\n  here",
    "phase": "backward",
    "requested_bytes": 5,
    "free_bytes": 4,
    "capacity_bytes": 9,
    "dominated_by": "activations_bytes",
}
BUFFERS = [
    {
        "bytes": 5,
        "count": 2,
        "shape": [1, 2],
        "module": "encoder",
        "category": "activations",
        "op": "mm",
        "dtype": "f",
        "place": "x",
    }
]
RECORDS = [
    a_measured_cell("full"),
    a_measured_cell("lora+checkpoint", device="cuda"),
    a_measured_cell("meft1", metrics={"peak_buffers": Metric(BUFFERS, "counted")}),
    an_exact_cell(),
    a_record("oom", {"peak_allocated_bytes": 9}, status_detail=DETAIL, batch_size=64),
    a_record("error", status_detail=DETAIL, batch_size=2),
    a_score("lora", 0.7),
    a_score("full", 0.8),
]
LINES = [record.to_json() for record in RECORDS]
SUITE = {
    "schema": 1,
    "run_id": "run-1",
    "suite_id": "suite-1",
    "protocol_id": "protocol-1",
    "name": "toy",
    "description": "a run",
    "source": "suite.yaml",
    "command": "run x",
    "protocol": {
        "warmup": 2,
        "steps": 5,
        "passes": ["memory"],
        "allocator": "default",
        "padding": 0.0,
        "timeout": 60.0,
    },
    "cells": [{"label": "a", "cell_id": "b"}],
}
GPU = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 2**36, "uuid": "GPU-1", "capability": "9.0"}
MACHINE = ENVIRONMENT | {"gpus": {"devices": [GPU], "driver": "570.1"}, "torch": {"version": "2.13.0", "cuda": "13.0"}}
ERROR = {
    "label": "a", "method": "full", "method_name": "full", "attention": "sdpa",
    "metric": "peak_allocated_bytes", "predicted": 5, "measured": 6, "precision": "fp32",
}  # fmt: skip
VALIDATION = {"profile": "h100", "spreads": [], "errors": [ERROR], "not_predicted": ["b: it failed"]}
BUDGETS = "schema: 1\nbudgets:\n  - {match: '*', metric: peak_allocated_bytes, max: 1GiB}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound run, one to be damaged beside it, and what commands write."""
    place = tmp_path_factory.mktemp("runs")
    a_run(place / "sound", *RECORDS, environment=MACHINE)
    (place / "b.yaml").write_text(BUDGETS)
    for asked in [*COMMANDS, *COMMANDS]:  # the second time, libraries are loaded
        began = time.process_time()
        command(*(part.format(place / "sound", place=place, sound=place / "sound") for part in asked.split()))
        USUAL_S[asked] = time.process_time() - began
    return place


USUAL_S: dict[str, float] = {}  # CPU seconds of each command on the sound run
COMMANDS = [
    "show {}",
    "show {} --json",
    "show {} --cells",
    "show {} */full/*",
    "show {} --traceback",
    "show {} */oom*",
    "check {} --budget {place}/b.yaml",
    "check {} --budget {place}/b.yaml --format junit",
    "check {} --budget {place}/b.yaml --baseline {sound} --json",
    "compare {} {sound}",
    "compare {sound} {} --all --format markdown",
    "compare {sound} {} --across --json",
    "export {}",
    "export {} --json",
    "export {} --format junit",
    "export {} --format bmf",
    "export {} --format github-action-benchmark -o {place}/benchmark.json",
    "export {} --format pytorch-v3",
    "validate {}",
    "report {} --format csv --out {place}/out",
    "report {} --format md --out {place}/out",
    "report {} --format html --out {place}/out",
]


def answers(folder, asked, **files):
    """The asked command answers or refuses in one line, on a run of which `files` were replaced."""
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    shutil.copytree(folder / "sound", folder / "damaged")
    for name, content in files.items():
        (folder / "damaged" / name.replace("_", ".")).write_bytes(content)
    names = {"place": folder, "sound": folder / "sound"}
    arguments = [part.format(folder / "damaged", **names) for part in asked.split()]

    with watched(folder, USUAL_S[asked]):
        code, _, err = command(*arguments)

    assert code in (0, 1, 2, 4, 5), err
    assert code != 2 or 1 == sum(line.startswith("meftbench: ") for line in err.splitlines())


def with_one(line, others):
    return b"\n".join([*(json.dumps(other).encode() for other in others), line, b""])


@hostile("records of a run")
@given(number=st.integers(0, len(LINES) - 1), data=st.data(), asked=st.sampled_from(COMMANDS))
def test_a_damaged_record_is_shown_or_refused(folder, number, data, asked):
    line = data.draw(mutated(LINES[number], "json", damaged=False))
    answers(folder, asked, records_jsonl=with_one(line, LINES[:number] + LINES[number + 1 :]))


@hostile("records of a run")
@given(number=st.integers(0, len(LINES) - 1), data=st.data(), asked=st.sampled_from(COMMANDS))
def test_a_damaged_metric_is_shown_or_refused(folder, number, data, asked):
    """The same where all that is mutated lies within the metrics, which are most of a record."""
    metrics = data.draw(mutated(LINES[number]["metrics"], "json", damaged=False))
    line = json.dumps(LINES[number] | {"metrics": "HERE"}).encode().replace(b'"HERE"', metrics)
    answers(folder, asked, records_jsonl=with_one(line, LINES[:number] + LINES[number + 1 :]))


@hostile("records of a run")
@given(content=mutated(LINES[0], "json"), asked=st.sampled_from(COMMANDS[:1] + COMMANDS[-1:]))
def test_a_damaged_file_of_records_is_shown_or_refused(folder, content, asked):
    answers(folder, asked, records_jsonl=content)


@hostile("environment of a run")
@given(content=mutated(MACHINE, "json"), asked=st.sampled_from(COMMANDS))
def test_a_damaged_environment_is_shown_or_refused(folder, content, asked):
    answers(folder, asked, environment_json=content)


@hostile("suite of a run")
@given(content=mutated(SUITE), asked=st.sampled_from(COMMANDS))
def test_a_damaged_suite_of_a_run_is_shown_or_refused(folder, content, asked):
    answers(folder, asked, suite_yaml=content)


@hostile("validation of a run")
@given(content=mutated(VALIDATION, "json"), asked=st.sampled_from(COMMANDS[-3:] + COMMANDS[:1]))
def test_a_damaged_validation_is_shown_or_refused(folder, content, asked):
    answers(folder, asked, validation_json=content)


def test_what_is_mutated_is_sound_before(folder):
    """So that the mutations reach what reads the files."""
    files = {"suite_yaml": yaml.safe_dump(SUITE).encode(), "validation_json": json.dumps(VALIDATION).encode()}
    for asked in COMMANDS:
        answers(folder, asked, **files)
