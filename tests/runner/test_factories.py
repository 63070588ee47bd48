"""Suites and verbs that name functions of the user's own: allowed or not, looked at first, and what records say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from meftbench import own_code
from meftbench.cli import main
from meftbench.plan.factories import FOLDER
from meftbench.records.store import load_run
from meftbench.runner import process
from own_models import the_line, write_suite
from stand_in import BRIEF, FINE, WRONG
from sweeps import WORKER, statuses

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "own_code.md").read_text(encoding="utf-8")


def run(capfd, *arguments):
    """Exit code, stdout, stderr of the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return ended.value.code, captured.out, captured.err


# --- allowed or not ---

TELLS = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"


@pytest.mark.parametrize(
    "command",
    [("run", "own.yaml"), *((verb, "tells:build", "full", "--batch-size", 1, "--sequence-length", 8)
      for verb in ("estimate", "export")), ("fit", "tells:build"),
     ("finetune", "tells:build", "lora", "rte", "--tokenizer", "x")],
)  # fmt: skip
def test_nothing_is_imported_that_was_not_allowed(command, here, capfd, monkeypatch):
    """One line that says what to add, exit 2, and nothing written; not by a variable of the shell either."""
    (here / "tells.py").write_text(TELLS)
    write_suite(here, {"model": "tells:build"})
    monkeypatch.setenv(FOLDER, str(here))
    before = sorted(here.iterdir())

    code, out, err = run(capfd, *command)

    assert (2, "") == (code, out)
    assert 1 == len(err.splitlines())
    assert (
        "'tells:build' is Python code, which is imported only when allowed; add --allow-code, or `allow_code: true`"
        in err
    )
    assert before == sorted(here.iterdir())


def test_dry_run_lists_the_cells_and_imports_nothing(here, capfd):
    (here / "tells.py").write_text(TELLS)
    write_suite(here, {"model": "tells:build", "batch": "tells:batch"})

    code, out, _ = run(capfd, "run", "own.yaml", "--dry-run")
    listed = json.loads(run(capfd, "run", "own.yaml", "--dry-run", "--json", "--allow-code")[1])

    assert 0 == code
    assert "imports and calls code: tells:batch, tells:build, with --allow-code only; nothing was imported" in out
    assert ["tells:batch", "tells:build"] == listed["code"]
    assert not (here / "imported").exists()


def test_what_the_worker_was_not_told_it_does_not_import(here, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)

    assert "add --allow-code" in the_line(own_code.load, "mine.models:build")
    assert "mine" not in sys.modules


# --- a run: looked at before the first cell, and what the records say (the worker measures by the stand-in) ---


@pytest.fixture
def measured_by_the_stand_in(here, monkeypatch):
    monkeypatch.setattr(process, "WORKER", WORKER)
    # Of plain functions the stand-in looks at: it loads no torch.
    (here / "plain.py").write_text("from helper import one\n\ndef build(depth=one):\n    return depth\n")
    (here / "helper.py").write_text("one = 1\n\ndef named_elsewhere():\n    return 2\n")
    return here


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("plain:biuld", "plain:biuld: module 'plain' has no 'biuld'; did you mean 'plain:build'?"),
        (
            {"name": "plain:build", "config": {"dept": 2}},
            "unexpected keyword argument 'dept': it takes depth;",
        ),
        (
            "plian:build",
            "plian:build: module 'plian' was not found in the working folder",
        ),
        (
            "fails:build",
            "fails:build: its import failed at fails.py:1: ZeroDivisionError",
        ),
    ],
)
def test_a_fault_in_the_code_ends_the_run_before_the_first_cell(model, said, measured_by_the_stand_in, capfd):
    """With the line of the suite, exit 2, and no folder; what is not chosen by --where is not looked at."""
    here = measured_by_the_stand_in
    (here / "fails.py").write_text("1 / 0\n")
    write_suite(here, {"model": "plain:build"}, {"model": model}, allow_code=True)

    code, out, err = run(capfd, "run", "own.yaml", "--out", "it")

    assert (2, "") == (code, out)
    assert 1 == len(err.splitlines())
    assert said in err
    assert re.search(r"^meftbench: own\.yaml:\d+: include\[1\]\.model: ", err)
    assert not (here / "it").exists()
    assert 0 == run(capfd, "run", "own.yaml", "--out", "it", "--where", "model=plain:build", "--limit", "1")[0]


def test_a_record_names_its_code_and_no_folder(measured_by_the_stand_in, capfd):
    """The digest is of the file that the function is named in and of the one it is defined in."""
    here = measured_by_the_stand_in
    (here / "plain.py").write_text("from helper import named_elsewhere\n")
    write_suite(here, {"model": "plain:named_elsewhere"}, {"model": "bert-base@random"})
    code, _, err = run(capfd, "run", "own.yaml", "--out", "it", "--allow-code")
    (own, named), before = load_run(here / "it").records, load_run(here / "it").suite["own_code"]
    (here / "helper.py").write_text("def named_elsewhere():\n    return 3\n")
    run(capfd, "run", "own.yaml", "--out", "again", "--allow-code")

    assert 0 == code, err
    assert {"plain:named_elsewhere"} == set(before) == set(own.cell["own_code"])
    assert before == own.cell["own_code"] != load_run(here / "again").suite["own_code"]
    assert "own_code" not in named.cell
    assert str(here) not in (here / "it" / "records.jsonl").read_text()


def test_resume_says_when_the_code_has_changed(measured_by_the_stand_in, capfd):
    """What has ended stands; the new records say of which code they are. Without a change nothing is said."""
    here = measured_by_the_stand_in
    write_suite(here, *({"model": "plain:build", "seed": seed} for seed in (FINE, BRIEF, WRONG)))
    command = ("run", "own.yaml", "--out", "it", "--allow-code")
    run(capfd, *command, "--limit", "1")

    said = run(capfd, *command, "--resume", "--limit", "1")[2]
    (here / "plain.py").write_text("def build():\n    return 0\n")
    changed = run(capfd, *command, "--resume")[2]

    assert "another than when the run began" not in said
    assert "the code of plain:build is another than when the run began; records are marked by own_code" in changed
    digests = [record.cell["own_code"]["plain:build"] for record in load_run(here / "it").records]
    assert 3 == len(digests)
    assert digests[0] == digests[1] != digests[2]


# --- with the real worker ---


@pytest.mark.slow
def test_the_documented_example_as_written(tmp_path):
    """Both files, both commands; the worker finds the code from the folder that the command was started in."""
    (tmp_path / "my_models.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "own.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    first, second = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()

    def typed(line, *more):
        words = [sys.executable, "-m", *line.split(), *more]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)

    ran = typed(first, "--out", "it", "-q")
    estimated = typed(second, "--json", "-q")

    assert 0 == ran.returncode, ran.stderr
    found = load_run(tmp_path / "it")
    assert ["ok"] * 3 == statuses(found)
    full, lora, exact = found.records
    assert 0 == exact.value("reconstruction_rel_max")
    assert full.value("activation_peak_bytes") > lora.value("activation_peak_bytes") > 0
    assert 0 == estimated.returncode, estimated.stderr
    # Two layers as `build` has them: the suite sets three.
    assert "my_models:build/meft1-exact/b4/s32/my_models:batch" == json.loads(estimated.stdout)["label"]
