"""After a command, people at a terminal read what to type next; pipes and JSON have nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from builders import a_record, a_run
from meftbench.cli import app, options
from meftbench.cli.options import say_next
from meftbench.plan.suite import shipped_suites
from snapshots import a_step, written

SHAPE = ("--batch-size", "2", "--sequence-length", "16")


@pytest.fixture
def at_terminal(monkeypatch):
    monkeypatch.setattr(options, "at_terminal", lambda: True)


COMMANDS = {
    ("show", "run"): "next: meftbench report run · meftbench show run --cells",
    ("show", "run", "*"): "next: meftbench show run · meftbench report run",
    ("report", "run", "--format", "csv"): "next: meftbench show run CELL",
    ("check", "run", "--budget", "budgets.yaml"): "next: meftbench show run CELL · meftbench report run",
    ("compare", "run", "run"): "next: meftbench report run run",
    ("list", "methods"): "next: meftbench estimate MODEL METHOD",
    ("list", "models"): "next: meftbench plan MODEL --memory 24GiB",
    ("list", "suites"): "next: meftbench run SUITE --dry-run",
    ("list", "profiles"): "next: meftbench estimate MODEL METHOD --profile NAME",
    ("inspect", "snapshot.pickle", "-q"): (
        "next: meftbench validate snapshot.pickle MODEL METHOD --batch-size N --sequence-length N"
    ),
    ("validate", "--published"): "next: meftbench estimate MODEL METHOD · meftbench list profiles",
    ("estimate", "bert-tiny@random", "lora", *SHAPE, "-q"): (
        "next: meftbench fit bert-tiny@random · meftbench plan bert-tiny@random"
    ),
    ("export", "run", "--output", "t.csv"): "next: meftbench report run · meftbench show run",
    ("doctor",): "next: meftbench run smoke · meftbench doctor --calibrate",
}


@pytest.fixture
def files(tmp_path):
    a_run(tmp_path / "run", a_record(metrics={"ooms": 0}))
    written(tmp_path, a_step())
    Path("budgets.yaml").write_text("schema: 1\nbudgets: [{match: '*', metric: ooms, max: 0}]\n")


@pytest.mark.usefixtures("at_terminal", "files")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_next_command_is_the_last_line_at_a_terminal(cli, command):
    code, out, err = cli(*command)

    assert code == 0
    assert err.splitlines()[-1].startswith(COMMANDS[command])
    assert "next:" not in out


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_pipe_has_none(cli, command):
    _, out, err = cli(*command)

    assert "next:" not in out + err


@pytest.mark.usefixtures("at_terminal", "files")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] != "export"], ids=" ".join)
def test_json_has_none(cli, command):
    _, out, err = cli(*command, "--json")

    assert json.loads(out.splitlines()[-1] if command[0] == "show" else out)
    assert "next:" not in out + err


@pytest.mark.usefixtures("at_terminal")
def test_a_name_with_spaces_is_quoted_for_the_shell(capsys):
    say_next(("show", Path("my run")))

    assert capsys.readouterr().err == "next: meftbench show 'my run'\n"


@pytest.mark.usefixtures("at_terminal")
def test_what_does_not_fit_the_width_is_left_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    say_next(("report", "a" * 30), ("show", "a" * 30))

    assert capsys.readouterr().err == f"next: meftbench report {'a' * 30}\n"


def test_what_is_said_can_be_typed():
    """Verbs and options of the commands that are said exist."""
    verbs = typer.main.get_command(app).commands
    for said in COMMANDS.values():
        for command in said.removeprefix("next: ").split(" · "):
            _, verb, *words = command.split()
            known = {option for parameter in verbs[verb].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known
    assert "smoke" in shipped_suites()
