"""Runs as they were committed: read from git, and compared with the checkout; what is not there is one line."""

from __future__ import annotations

import subprocess

import pytest

from builders import a_record, a_run
from meftbench.verdicts import revision

METRIC = "activation_peak_bytes"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a run of 5 bytes, committed and tagged `v1`; in the checkout it has 6. The current folder."""
    folder = tmp_path / "repository with spaces"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "tester@localhost")

    def git(*arguments):
        subprocess.run(["git", *arguments], check=True, capture_output=True)

    git("init", "-q")
    a_run(folder / "runs" / "a", a_record(metrics={METRIC: 5}))
    git("add", "runs")
    git("commit", "-q", "-m", "a run")
    git("tag", "v1")
    (folder / "runs" / "a" / "records.jsonl").unlink()
    a_run(folder / "runs" / "a", a_record(metrics={METRIC: 6}))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs/a", "--against", "HEAD"),
        ("runs/a", "--against", "v1"),
        ("HEAD:runs/a", "runs/a"),
        ("v1:./runs/a", "runs/a"),
    ],
)
def test_a_run_is_compared_with_what_was_committed(cli, repository, arguments):
    """By a commit or a tag, as an option or spelled out; the checkout is not touched."""
    code, out, err = cli("compare", *arguments, "--fail-on", "regression")

    assert (1, "") == (code, err)
    assert "activation_peak_bytes 5 B -> 6 B counted (+1 B, +20.00%)" in out


def test_the_folder_may_be_named_from_below_the_top(cli, repository, monkeypatch):
    """`./` is the current folder, as for git; a plain path is relative to the top."""
    monkeypatch.chdir(repository / "runs")

    assert "5 B -> 6 B" in cli("compare", "a", "--against", "HEAD")[1]
    assert "5 B -> 6 B" in cli("compare", "HEAD:./a", "a")[1]
    assert "5 B -> 6 B" in cli("compare", "HEAD:runs/a", "a")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/a", "--against", "no-such"), "no-such:runs/a: no revision 'no-such'; name a commit"),
        (("runs/a", "--against", "--output=x"), "no revision '--output=x'"),
        (("HEAD:runs/b", "runs/a"), "has no run in runs/b; a run has suite.yaml"),
        (("HEAD:../b", "runs/a"), "is not inside the repository"),
        (("runs/a", "runs/a", "--against", "HEAD"), "--against: 2 runs are named"),
        (("runs/a",), "compare: only one run is named"),
        (("runs/b", "--against", "HEAD"), "runs/b: no such run folder"),
    ],
)
def test_what_is_not_there_is_one_line(cli, repository, arguments, message):
    """Exit 2, and nothing on stdout."""
    code, out, err = cli("compare", *arguments)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert message in err


def test_budgets_may_grow_from_a_committed_run(cli, repository):
    """`check --baseline HEAD:FOLDER`."""
    row = f"{{match: '*', metric: {METRIC}, baseline: true, max_increase: 0%}}"
    (repository / "b.yaml").write_text(f"schema: 1\nbudgets:\n  - {row}\n")

    code, out, _ = cli("check", "runs/a", "--budget", "b.yaml", "--baseline", "HEAD:runs/a")

    assert 1 == code
    assert "activation_peak_bytes 6 B (counted) is over max_increase 5 B; over by 1 B" in out


def test_outside_of_a_repository_it_is_said(cli, tmp_path, monkeypatch):
    """Two run folders can be compared anywhere."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a", a_record(metrics={METRIC: 5}))

    code, _, err = cli("compare", "a", "--against", "HEAD")

    assert (2, 1) == (code, err.count("\n"))
    assert "is in no git repository" in err


def test_without_git_it_is_said(cli, repository, monkeypatch):
    """The program is not there."""
    monkeypatch.setenv("PATH", "")

    code, _, err = cli("compare", "runs/a", "--against", "HEAD")

    assert (2, 1) == (code, err.count("\n"))
    assert "git is not installed" in err


def test_a_folder_with_a_colon_in_its_name_is_a_folder(cli, repository):
    """What is there comes before what could be meant."""
    a_run(repository / "HEAD:runs", a_record(metrics={METRIC: 7}))

    assert 7 == revision.load_named("HEAD:runs").records[0].value(METRIC)


def test_a_damaged_run_of_a_revision_is_named_by_the_revision(cli, repository):
    """Not by the temporary folder that it was read in."""
    (repository / "runs" / "a" / "records.jsonl").write_text("no record\n")
    subprocess.run(["git", "commit", "-q", "-a", "-m", "damaged"], check=True)

    code, _, err = cli("compare", "v1:runs/a", "HEAD:runs/a")

    assert (2, 1) == (code, err.count("\n"))
    assert err.startswith("meftbench: HEAD:runs/a: is not a record")


def test_a_content_that_a_partial_clone_left_out_is_said(cli, repository, tmp_path, monkeypatch):
    """Without its records the run would look empty, and a comparison would blame the cells."""
    subprocess.run(["git", "config", "uploadpack.allowFilter", "true"], check=True)
    clone = tmp_path / "partial"
    filtered = ["git", "clone", "-q", "--no-checkout", "--filter=blob:none", f"file://{repository}", str(clone)]
    subprocess.run(filtered, check=True, capture_output=True)
    subprocess.run(["git", "-C", str(clone), "remote", "set-url", "origin", str(tmp_path / "gone")], check=True)
    monkeypatch.chdir(clone)

    code, out, err = cli("compare", "HEAD:runs/a", repository / "runs" / "a")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert "meftbench: HEAD:runs/a: the content of runs/a/" in err
    assert " is not in this clone; fetch it" in err


def test_a_link_that_was_committed_is_said(cli, repository):
    """Its content is the name of another file, and no records."""
    records = repository / "runs" / "a" / "records.jsonl"
    records.rename(repository / "elsewhere.jsonl")
    records.symlink_to("../../elsewhere.jsonl")
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-qm", "a link"], check=True)

    code, out, err = cli("compare", "HEAD:runs/a", "runs/a")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert "runs/a/records.jsonl of " in err
    assert " is a symbolic link; commit the file itself" in err


@pytest.mark.parametrize("bare", [True, False])
def test_a_repository_without_a_checkout_is_said(cli, repository, tmp_path, monkeypatch, bare):
    """In a bare repository, or within `.git`: it is a repository, so that it is not said to be none."""
    subprocess.run(["git", "clone", "-q", "--bare", ".", str(tmp_path / "bare")], check=True)
    folder = tmp_path / "bare" if bare else repository / ".git"
    monkeypatch.chdir(folder)

    code, out, err = cli("compare", "HEAD:runs/a", repository / "runs" / "a")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert f"{folder} is inside git's own folder (.git, or a bare repository), which has no checkout; call it in" in err
