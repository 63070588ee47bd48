"""What a run folder, a suite or a repository says does not decide that files elsewhere are read or written."""

from __future__ import annotations

import os
import time

import pytest
import yaml

from builders import a_measured_cell, a_run
from meftbench.errors import UserError
from meftbench.plan.suite import load_suite
from mutations import SUITE, command

METRIC = "activation_peak_bytes"
BUDGETS = f"schema: 1\nbudgets:\n  - {{match: '*', metric: {METRIC}, max: 1}}\n"


def a_pipe(file):
    os.mkfifo(file)


def a_device(file):
    file.symlink_to("/dev/zero")


def memory(file):
    file.symlink_to("/proc/self/mem")


def a_sparse_file(file):
    with file.open("wb") as stream:
        stream.truncate(200 * 2**30)


def words(file):
    file.symlink_to("/etc/passwd")


def of_another_schema(file):
    file.write_text("schema: 1\nrows: []\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [a_pipe, a_device, memory, a_sparse_file, words, of_another_schema])
def test_budgets_of_a_suite_are_checked_before_anything_is_run(tmp_path, put):
    """As `check` reads them: nothing else is ever copied into a run folder."""
    put(tmp_path / "b.yaml")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE | {"budgets": "b.yaml"}))

    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_suite(str(tmp_path / "suite.yaml"))
    code, out, err = command("run", tmp_path / "suite.yaml", "--out", tmp_path / "run")

    assert time.perf_counter() - began < 10
    assert (2, "", f"meftbench: {caught.value}\n") == (code, out, err)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def elsewhere(tmp_path):
    """A budgets file that a user has in another place than the working folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.yaml").write_text(BUDGETS)
    return tmp_path / "elsewhere" / "b.yaml"


@pytest.fixture
def working(tmp_path, monkeypatch):
    """The working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def a_run_with_budgets(folder, named=None):
    return a_run(folder, a_measured_cell(), budgets=str(named) if named else None)


def test_update_writes_the_budgets_of_the_suite_below_the_working_folder(working):
    """And, where the suite's file is gone, the copy in the run folder."""
    (working / "b.yaml").write_text(BUDGETS)
    run = a_run_with_budgets(working / "run", working / "b.yaml")
    (run.path / "budgets.yaml").write_text(BUDGETS)

    assert 0 == command("check", run.path, "--update")[0]
    assert BUDGETS != (working / "b.yaml").read_text()
    assert BUDGETS == (run.path / "budgets.yaml").read_text()
    (working / "b.yaml").unlink()
    assert 0 == command("check", run.path, "--update")[0]
    assert BUDGETS != (run.path / "budgets.yaml").read_text()


@pytest.mark.parametrize("through", ["path", "parent", "link", "folder", "copy"])
def test_update_writes_nothing_elsewhere(working, elsewhere, through):
    """Unless the user names it; to be held against budgets elsewhere is no harm."""
    named = elsewhere
    if through == "parent":
        named = working / ".." / "elsewhere" / "b.yaml"
    if through == "link":
        named = working / "b.yaml"
        named.symlink_to(elsewhere)
    if through == "folder":
        (working / "suites").symlink_to(elsewhere.parent)
        named = working / "suites" / "b.yaml"
    run = a_run_with_budgets(working / "run", None if through == "copy" else named)
    if through == "copy":
        (run.path / "budgets.yaml").symlink_to(elsewhere)

    code, out, err = command("check", run.path, "--update")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert err.endswith("; to change that file, name it with --budget\n")
    assert BUDGETS == elsewhere.read_text()
    assert 1 == command("check", run.path)[0]
    assert 0 == command("check", run.path, "--budget", elsewhere, "--update")[0]
    assert BUDGETS != elsewhere.read_text()


@pytest.mark.parametrize("part", [".github", ".github/workflows", "suites", "suites/bert-tiny.yaml"])
@pytest.mark.parametrize("more", [(), ("--force",)])
def test_init_writes_through_no_link(working, tmp_path, part, more):
    """Whichever part of a path below the output folder it is."""
    (tmp_path / "target").mkdir()
    (working / part).parent.mkdir(exist_ok=True)
    (working / part).symlink_to(tmp_path / "target")
    before = sorted(working.rglob("*"))

    code, out, err = command("init", "bert-tiny@random", *more)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert f"{part}: is a symbolic link" in err
    assert [] == list((tmp_path / "target").iterdir())
    assert before == sorted(working.rglob("*"))


@pytest.mark.timeout(60)
def test_init_waits_for_no_pipe(working):
    """In place of the workflow that an earlier `init` may have written."""
    (working / ".github" / "workflows").mkdir(parents=True)
    a_pipe(working / ".github" / "workflows" / "memory.yml")

    code, _, err = command("init", "bert-tiny@random")

    assert (2, True) == (code, "memory.yml: is there already" in err)
