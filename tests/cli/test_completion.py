"""The shell completes names of the catalogue, suites and run folders, as bash, zsh and fish ask for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from builders import a_record, a_run
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.profiles import PROFILES
from meftbench.cli import app, completion
from meftbench.plan.suite import shipped_suites


def words(found):
    return [word for word, _ in found]


@pytest.fixture
def completes(cli, monkeypatch):
    """What bash is told for a line whose last word is begun."""

    def ask(*line):
        monkeypatch.setenv("_MEFTBENCH_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["meftbench", *line]))
        monkeypatch.setenv("COMP_CWORD", str(len(line)))
        code, out, err = cli()
        assert (0, "") == (code, err)
        return out.split()

    return ask


def test_names_are_completed_where_they_stand(completes):
    assert completes("run", "smo") == ["smoke", "smollm2"]
    assert "bert-base" in completes("estimate", "bert")
    assert completes("estimate", "bert-base", "lora+chu") == ["lora+chunked_loss"]
    assert completes("estimate", "bert-base", "lora", "--profile", "a100-8") == ["a100-80gb"]
    assert completes("fit", "bert-base", "--methods", "full,lora-") == ["full,lora-fa"]
    assert completes("finetune", "minilm", "lora", "sst") == ["sst2"]
    assert completes("list", "schema", "rec") == ["record"]
    assert completes("list", "prof") == ["profiles"]
    assert "bf16" in completes("estimate", "bert-base", "lora", "--precision", "b")


@pytest.mark.parametrize("verb", ["show", "report", "compare", "check", "validate", "export"])
def test_run_folders_are_completed(completes, tmp_path, verb):
    a_run(tmp_path / "runs" / "smoke-1", a_record())
    a_run(tmp_path / "mine", a_record())
    (tmp_path / "runs" / "no-run").mkdir()

    assert completes(verb, "runs/") == ["runs/smoke-1"]
    assert completes(verb, "mi")[0] == "mine"


def test_the_newest_run_comes_first(tmp_path):
    for age, name in enumerate(["new", "old", "older"]):
        file = a_run(tmp_path / "runs" / name, a_record()).path / "records.jsonl"
        os.utime(file, (1e9 - age, 1e9 - age))

    assert words(completion.runs("")) == ["runs/new", "runs/old", "runs/older"]


def test_everything_that_can_be_named_is_offered():
    assert words(completion.methods("")) == list(METHODS)
    assert words(completion.methods("full+")) == [f"full+{name}" for name in LEVERS]
    assert words(completion.models("")) == list(MODELS)
    assert words(completion.models("bert-base@")) == ["bert-base@random"]
    assert words(completion.profiles("")) == list(PROFILES)
    assert words(completion.suites("")) == sorted(shipped_suites())


def test_a_lever_that_is_there_is_not_offered_again():
    assert "lora+checkpoint(every=2)+checkpoint" not in words(completion.methods("lora+checkpoint(every=2)+"))
    assert "lora+checkpoint(every=2)+offload" in words(completion.methods("lora+checkpoint(every=2)+"))


def test_a_suite_of_ones_own_is_offered():
    Path("suites").mkdir()
    Path("suites/nightly.yaml").touch()
    Path("suites/nightly.budgets.yaml").touch()

    assert words(completion.suites("night")) == ["nightly"]


def test_what_is_offered_does_not_load_torch():
    asked = "\n".join(f"completion.{name}('')" for name in ("methods", "models", "profiles", "suites", "runs", "tasks"))
    program = f"import sys\nfrom meftbench.cli import completion\n{asked}\n"
    program += "assert not {'torch', 'pandas'} & {*sys.modules}"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(cli, monkeypatch, shell):
    """`meftbench --show-completion` prints the script of the shell it runs in."""
    monkeypatch.setenv("_MEFTBENCH_COMPLETE", f"source_{shell}")
    code, out, _ = cli()

    assert code == 0
    assert f"complete_{shell}" in out
    assert "_MEFTBENCH_COMPLETE" in out


def test_completion_can_be_installed_and_the_version_said(cli):
    options = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}

    assert {"--install-completion", "--show-completion", "--version"} <= options
    assert cli("--version")[1].startswith("meftbench 0.")
