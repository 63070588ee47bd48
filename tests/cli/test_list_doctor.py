"""`meftbench list` and `meftbench doctor`, and what the command line loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import METRICS
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.peft_methods import NOT_APPLICABLE
from meftbench.catalogue.profiles import PROFILES
from meftbench.cli.doctor import findings, rendered
from meftbench.runner import process


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", [*METHODS, *(f"+{lever}" for lever in LEVERS), *NOT_APPLICABLE]),
        ("models", MODELS),
        ("metrics", METRICS),
        ("profiles", PROFILES),
    ],
)
def test_list_names_everything_a_suite_may_name(cli, kind, names):
    code, out, _ = cli("list", kind)

    assert 0 == code
    assert list(names) == [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert list(names) == list(json.loads(cli("list", kind, "--json")[1]))


def test_list_suites_names_those_of_the_folder_and_of_the_package(cli):
    Path("suites").mkdir()
    Path("suites/nightly.yaml").write_text("schema: 1\nname: nightly\ndescription: every night\n")

    _, out, _ = cli("list", "suites")

    assert any(line.split() == ["nightly", "every", "night"] for line in out.splitlines())


def test_the_schema_takes_what_the_program_takes(cli):
    """Editors complete keys from it: every key of the format, a value or a list on each axis, durations as text."""
    schema = json.loads(cli("list", "schema")[1])
    grid, protocol = (schema["$defs"][name]["properties"] for name in ("Grid", "Protocol"))

    assert {"schema", "name", "protocol", "defaults", "grid", "include", "exclude", "budgets"} <= set(
        schema["properties"]
    )
    assert ["integer", "array"] == [form["type"] for form in grid["batch_size"]["anyOf"]]
    assert {"number", "string"} == {form["type"] for form in protocol["timeout"]["anyOf"]}
    assert schema["additionalProperties"] is False


def test_a_kind_that_is_none_is_refused(cli):
    code, out, err = cli("list", "metods")

    assert (2, "", 1) == (code, out, len(err.splitlines()))


def test_doctor_says_what_can_be_measured_without_a_gpu(cli):
    """A machine without a GPU is no failure."""
    code, out, _ = cli("doctor")

    assert 0 == code
    assert "counted       can be measured" in out
    assert "cuda          cannot be measured: " in out


def test_doctor_in_json_has_versions_and_host(cli):
    code, out, _ = cli("doctor", "--json")

    content = json.loads(out)
    assert 0 == code
    assert content["packages"]["torch"]
    assert content["host"]["cores"] >= 1
    assert "yes" == content["measures"]["counted"]


def test_doctor_finds_a_torch_that_cannot_be_loaded(monkeypatch):
    """It says so, and does not fail itself."""
    monkeypatch.setattr(process, "WORKER", (sys.executable, "-m", "meftbench.worker", "--requests", "no_torch"))

    found = findings()

    assert "No module named 'no_torch'" in found["measures"]["counted"]
    assert "No module named 'no_torch'" in rendered(found)


# --- what is loaded ---


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"], ["run", "toy.yaml", "--dry-run"]])
def test_the_command_line_does_not_load_torch(arguments):
    """Nor what takes long beside it: help and validation are for people who wait."""
    suite = {"schema": 1, "name": "toy", "grid": {"model": "bert-tiny@random", "method": "full", "batch_size": 1}}
    suite["grid"]["sequence_length"] = 16
    Path("toy.yaml").write_text(yaml.safe_dump(suite))
    program = f"""
import sys
from meftbench.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "peft", "pandas", "matplotlib", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""

    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
