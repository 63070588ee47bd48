"""What commands print cannot act on the terminal, whoever wrote the names in it."""

from __future__ import annotations

import ast
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meftbench
from builders import a_record, a_run
from meftbench.cli.estimate import lines
from meftbench.cli.output import put, put_error, put_json
from meftbench.escapes import path_text
from test_escapes import HOSTILE, TEXTS, acts

PACKAGE = Path(meftbench.__file__).parent
ESCAPE, OVERRIDE = "\x1b[31mred", "\u202egnp"


def names_in(file):
    """The names that a module uses, also those with dots, such as `sys.stdout.write`."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}


@pytest.mark.parametrize("file", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda file: file.stem)
def test_only_one_module_of_the_command_line_prints(file):
    """Others call it: a bare `print` would show what strangers wrote as it is."""
    if file.name != "output.py":
        assert not {"print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write"} & names_in(file)


@pytest.mark.parametrize("file", sorted((PACKAGE / "report").rglob("*.py")), ids=lambda file: file.stem)
def test_only_one_module_makes_texts_for_rich(file):
    """Others call it, and none prints by itself."""
    used = names_in(file)

    assert "print" not in used
    assert file.name == "console.py" or not {"Text", "rich.text.Text"} & used


@given(TEXTS, TEXTS)
def test_printed_text_does_not_act(first, second):
    """On either stream, a line for each argument."""
    out, err = io.StringIO(), io.StringIO()

    with redirect_stdout(out), redirect_stderr(err):
        put(first, path_text(second))
        put_error(first, path_text(second))

    assert [] == acts(out.getvalue())
    assert out.getvalue() == err.getvalue()
    assert "\n" not in path_text(second)
    assert out.getvalue().endswith(f"\n{path_text(second)}\n")


@given(st.dictionaries(TEXTS, st.integers() | TEXTS))
def test_printed_json_is_what_was_given(content):
    """With escapes in place of what acts on a terminal."""
    out = io.StringIO()

    with redirect_stdout(out):
        put_json(content)

    assert [] == acts(out.getvalue())
    assert content == json.loads(out.getvalue())


@pytest.mark.parametrize("path", ["a  b", "été", "a\u3000b"])
def test_a_path_that_can_be_seen_is_as_it_is(path):
    """Double spaces, too, so that it can be copied."""
    assert path == path_text(path)


@pytest.mark.parametrize("name", [ESCAPE, OVERRIDE, "a\nb"])
def test_paths_are_named_visibly(cli, tmp_path, monkeypatch, name):
    """By every command that says where it wrote: each on one line, in text and in JSON."""
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / name, a_record(metrics={"activation_peak_bytes": 5, "peak_allocated_bytes": 6}))
    commands = [
        ("report", run.path, "--format", "csv"),
        ("export", run.path, "-o", f"{name}.csv"),
        ("export", run.path, "--format", "github-action-benchmark", "-o", f"{name}.json"),
        ("compare", run.path, run.path, "--output", f"{name}.txt"),
        ("init", "bert-base@random", "--out", f"{name}-mine"),
    ]

    for command in commands:
        code, out, err = cli(*command)
        assert 0 == code, err
        assert [] == acts(out + err)
        assert path_text(name) in out + err
    _, out, err = cli("report", run.path, "--format", "csv", "--json")
    assert [] == acts(out + err)
    assert [str(run.path / "table.csv")] == json.loads(out)["files"]


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
def test_suites_and_their_cells_are_named_visibly(cli, tmp_path, monkeypatch, as_json):
    """The name of a file in ./suites, the path of a model."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / f"{ESCAPE}{OVERRIDE}"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    file = tmp_path / "suites" / f"{ESCAPE}.yaml"
    file.parent.mkdir()
    grid = {"model": [f"{model}@random"], "method": ["full"], "batch_size": [1], "sequence_length": [8]}
    file.write_text(json.dumps({"schema": 1, "name": "toy", "protocol": {"passes": ["memory"]}, "grid": grid}))

    for command in (("run", file, "--dry-run"), ("list", "suites")):
        code, out, err = cli(*command, *as_json)
        assert 0 == code, err
        assert [] == acts(out + err)
        assert "[31mred" in out


def test_a_cell_id_is_named_visibly(cli, tmp_path):
    """Also in the list of cells."""
    run = a_run(tmp_path / "run", a_record(cell_id=f"{ESCAPE}0", metrics={"activation_peak_bytes": 5}))

    for more in ((), ("--json",)):
        code, out, _ = cli("show", run.path, "--cells", *more)
        assert 0 == code
        assert [] == acts(out)


@pytest.mark.parametrize("text", HOSTILE[:5])
def test_the_answer_of_estimate_is_printed_visibly(text):
    """Its first line is the label, in which the path of a model stands."""
    answer = {
        "label": text, "device": text, "memory_bytes": 1, "profile": text, "validation": text, "rules": text,
        "context_bytes": 1, "peak_reserved_bytes": 1, "process_device_bytes": 1, "peak_allocated_bytes": 1,
        "peak_phase": text, "fits": True, "headroom_bytes": 1, "breakdown": {}, "activation_peak_bytes": 1,
        "parameters_trainable": 1, "parameters_total": 1, "attention": [text], "step_s": None, "time_absent": text,
        "recomputed_flops_share": 0.0, "host_transfer_bytes": 0, "predict_s": 1.0, "host_bytes": 1,
    }  # fmt: skip
    out = io.StringIO()

    with redirect_stdout(out):
        put(*lines(answer))

    assert [] == acts(out.getvalue())
