"""What commands print with --json is what its JSON Schema says, with no field that the schema does not name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from builders import a_measured_cell, a_record, a_run, counted, measured
from meftbench.catalogue.metrics import METRICS
from meftbench.catalogue.profiles import PROFILES, find_profile
from meftbench.cli.listing import Kind
from meftbench.records.record import Metric
from meftbench.runner import process
from meftbench.schemas import DRAFT, FOLDER, FORMATS, made, schema_of, text_of
from scored_runs import a_score
from snapshots import a_step, written

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ("--batch-size", "2", "--sequence-length", "16")
SUITE = """
schema: 1
name: toy
protocol: {repeats: 1}
grid: {model: bert-tiny@random, method: [full, lora], batch_size: 1, sequence_length: 16}
"""
BUDGETS = """
schema: 1
budgets:
  - {match: "*/full/*", metric: activation_peak_bytes, max: 1MiB}
  - {match: "*/nothing/*", metric: peak_allocated_bytes, max: 1MiB}
"""
# Cells of trainings have fields of their data, and tables of the catalogue those of their kind.
OPEN = ("RecordedCell", "Listed")


def closed(schema: Any, name: str = "") -> Any:
    """The schema, in which objects with named fields may have no others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    content = {key: {n: closed(s, n) for n, s in value.items()} if key == "$defs" else closed(value)
               for key, value in schema.items()}  # fmt: skip
    if "properties" in schema and name not in OPEN:
        content["additionalProperties"] = False
    return content


def faults(name: str, answer: Any) -> list[str]:
    """What is wrong with an answer, and where."""
    return [f"{list(fault.path)}: {fault.message}"
            for fault in Draft202012Validator(closed(schema_of(name))).iter_errors(answer)]  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Two runs beside each other in the working folder, with every kind of end, number and absence."""
    odd = {"gradient_rel_max": measured(float("inf")), "reconstruction_rel": Metric([[0.5, float("nan")]], "measured")}
    odd |= {"device_used_bytes": Metric(None, "measured", absent="no driver")}
    records = [a_measured_cell("full"), a_measured_cell("lora+checkpoint"), a_record("ok", odd, method="meft3")]
    records += [a_record("oom", method="houlsby", status_detail={"requested_bytes": 4096}), a_score("lora", 0.5)]
    a_run(tmp_path / "run", *records)
    a_run(tmp_path / "other", a_measured_cell("full", metrics={}), records[1])
    on_gpu = {"gpus": {"devices": [{"index": 0, "name": find_profile("t4").device}], "driver": "1", "absent": None}}
    peaks = {"peak_allocated_bytes": measured(2**25), "activation_peak_bytes": measured(2**21)}
    tiny = a_record(metrics=peaks, device="cuda", model="bert-tiny@random", batch_size=2, sequence_length=16)
    a_run(tmp_path / "measured", tiny, environment=on_gpu)
    written(tmp_path, a_step())
    Path("toy.yaml").write_text(SUITE)
    Path("budgets.yaml").write_text(BUDGETS)


ANSWERS = {
    ("run", "toy.yaml", "--dry-run"): "dry-run",
    ("run", "toy.yaml", "-q"): "run",
    ("check", "run", "--budget", "budgets.yaml"): "check",
    ("compare", "run", "other"): "compare",
    ("report", "run"): "written",
    ("init", "bert-tiny@random", "--out", "mine"): "written",
    ("export", "run"): "export",
    ("export", "run", "--format", "junit", "-o", "it.xml"): "written",
    ("export", "run", "--format", "github-action-benchmark", "-o", "it.json"): "written",
    ("export", "bert-tiny@random", "lora", *SHAPE, "-q"): "written",
    ("export", "bert-tiny@random", "lora", *SHAPE, "--format", "timeline", "-q"): "written",
    ("doctor",): "doctor",
    ("estimate", "bert-tiny@random", "lora+checkpoint", *SHAPE, "-q"): "estimate",
    ("fit", "bert-tiny@random", "--memory", "550MiB", "--methods", "full", "--sequence-lengths", "64", "-q"): "fit",
    ("inspect", "snapshot.pickle", "-q", "--memory", "30MiB"): "inspect",
    ("validate", "--published"): "validate-published",
    ("validate", "measured", "-q"): "validate-run",
    **{("list", kind): "list" for kind in Kind if kind is not Kind.schema},
}


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("command", ANSWERS, ids=" ".join)
def test_an_answer_is_as_its_schema_says(cli, command):
    _, out, err = cli(*command, "--json")

    assert out, err
    assert faults(ANSWERS[command], json.loads(out)) == []


@pytest.mark.usefixtures("runs")
def test_records_are_as_their_schema_says(cli):
    lines = cli("show", "run", "--json")[1].splitlines()

    assert len(lines) == 5
    for line in [*lines, *Path("run/records.jsonl").read_text().splitlines()]:
        assert faults("record", json.loads(line)) == []


@pytest.mark.usefixtures("runs")
def test_the_cells_of_a_run_are_as_their_schema_says(cli):
    lines = cli("show", "run", "--cells", "--json")[1].splitlines()

    assert [[]] * 5 == [faults("cell", json.loads(line)) for line in lines]


@pytest.mark.usefixtures("runs")
def test_an_exported_run_is_as_its_schema_says(cli):
    assert faults("export", json.loads(cli("export", "run", "--format", "json")[1])) == []


def test_a_training_is_as_its_schema_says(tmp_path, cli):
    a_run(tmp_path / "run", a_score("full", None), a_score("lora", 0.5, seed=1))

    for line in cli("show", "run", "--json")[1].splitlines():
        assert faults("record", json.loads(line)) == []


def test_a_plan_is_as_its_schema_says(cli, monkeypatch, worker_command):
    monkeypatch.setattr(process, "WORKER", worker_command)
    asks = (
        "--levers",
        "none",
        "--sequence-length",
        16,
        "--batch-size",
        2,
        "--methods",
        "lora,lora+checkpoint",
        "--needs",
        "--map",
    )
    _, out, err = cli("plan", "bert-tiny@random", "--memory", "1GiB", "--next", "2GiB", *asks, "--json", "-q")

    assert out, err
    assert faults("plan", json.loads(out)) == []


@pytest.mark.usefixtures("runs")
def test_a_validated_snapshot_is_as_its_schema_says(cli, monkeypatch, worker_command):
    monkeypatch.setattr(process, "WORKER", worker_command)
    cli("export", "bert-tiny@random", "lora", *SHAPE, "-o", "step.pickle", "-q")
    _, out, err = cli("validate", "step.pickle", "bert-tiny@random", "lora", *SHAPE, "--json", "-q")

    assert out, err
    assert faults("validate-snapshot", json.loads(out)) == []


@pytest.mark.parametrize(
    "name", ["minilm-cpu", "smollm2-cpu", "best-levers", "quality-minilm", "bert-base-streams-cpu"]
)
def test_committed_records_are_as_their_schema_says(name):
    lines = (ROOT / "reports" / name / "records.jsonl").read_text().splitlines()
    validator = Draft202012Validator(schema_of("record"))

    assert [fault.message for line in lines[::7] for fault in validator.iter_errors(json.loads(line))] == []


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_are_as_their_schema_says(name):
    assert faults("profile", PROFILES[name].model_dump(mode="json", by_alias=True)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_of_the_package_are_those_of_the_types(name):
    """Otherwise: `python -m meftbench.schemas` writes them anew."""
    content = schema_of(name)
    Draft202012Validator.check_schema(content)

    assert content["$schema"] == DRAFT
    assert content["description"]
    assert (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8") == text_of(made(name))


def test_schemas_are_listed_and_printed_by_name(cli):
    listed = json.loads(cli("list", "schemas", "--json")[1])

    assert list(listed) == list(FORMATS)
    assert all(Path(entry["file"]).is_file() for entry in listed.values())
    assert json.loads(cli("list", "schema", "record", "--json")[1]) == schema_of("record")
    assert json.loads(cli("list", "schema")[1]) == schema_of("suite")


def test_a_schema_that_is_none_is_refused_with_the_nearest(cli):
    code, out, err = cli("list", "schema", "recrod")

    assert (2, "") == (code, out)
    assert err == "meftbench: list schema: unknown schema 'recrod'; did you mean 'record'?\n"
    assert cli("list", "methods", "lora")[0] == 2


def test_a_wrong_record_is_refused():
    """The schema says something: without a unit, with another status, or as an older version, a record is none."""
    record = a_measured_cell("full").to_json()
    without_unit = {**record, "metrics": {"build_s": {"value": 1.0, "source": "measured"}}}

    assert faults("record", record) == []
    for wrong in (without_unit, {**record, "status": "fine"}, {**record, "schema": 0}, {**record, "new": 1}):
        assert len(faults("record", wrong)) == 1


@given(value=st.one_of(st.integers(0, 2**60), st.floats(), st.lists(st.floats(), max_size=3)),
       name=st.sampled_from(list(METRICS)))  # fmt: skip
def test_whatever_a_metric_holds(value, name):
    record = a_record(metrics={name: Metric(value, "counted"), "ooms": counted(0)})

    assert faults("record", json.loads(json.dumps(record.to_json(), allow_nan=False))) == []
