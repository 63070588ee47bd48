"""`meftbench init`: what it writes runs, and its budgets hold; it overwrites nothing and writes all files or none."""

from __future__ import annotations

import os
import re
import stat

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meftbench.backbones.build import build_model
from meftbench.errors import UserError
from meftbench.plan.budgets import load_budgets
from meftbench.plan.suite import load_suite
from meftbench.starting import _slug, start_of, write_all
from meftbench.strict_yaml import parse

FILES = ["suites/bert-tiny.yaml", "suites/bert-tiny.budgets.yaml", ".github/workflows/memory.yml"]
SMALL = ("--method", "full", "--method", "meft1-exact(tiles=2)", "--batch-size", 2, "--sequence-length", 8)


def files_in(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_runs_its_budgets_are_filled_and_then_they_hold(cli, repository):
    """By the commands that it ends with, as they are printed."""
    code, out, err = cli("init", "bert-tiny@random", *SMALL)
    assert (0, "") == (code, err)
    assert [f"{file}: written" for file in FILES] == out.splitlines()[:3]
    assert sorted(FILES) == files_in(repository)

    code, out, _ = cli("run", "bert-tiny", "--dry-run")
    assert 0 == code
    assert "2 cells, 2 processes; nothing was run" in out
    assert 0 == cli("run", "bert-tiny", "--out", "runs/bert-tiny", "-q")[0]
    assert 1 == cli("check", "runs/bert-tiny")[0]
    assert 0 == cli("check", "runs/bert-tiny", "--update")[0]
    code, out, _ = cli("check", "runs/bert-tiny")
    assert (0, "6 verdicts: 6 held") == (code, out[:18])
    assert all(row.max for row in load_budgets(FILES[1]).rows if row.metric != "drift_bytes_per_step")


def test_with_run_the_budgets_are_filled_at_once(cli, repository):
    """In a folder other than the working one, too; the model's folder is found from there."""
    build_model("bert-tiny@random").save_pretrained("models/my bert")

    code, out, _ = cli("init", "models/my bert", "--method", "lora", *SMALL[4:], "--out", "repo", "--run", "-q")

    assert 0 == code
    assert out.splitlines()[-1] == (
        "next: cd repo && git add suites/my-bert.yaml suites/my-bert.budgets.yaml .github/workflows/memory.yml"
    )
    assert "../models/my bert" == yaml.safe_load((repository / "repo/suites/my-bert.yaml").read_text())["grid"]["model"]
    os.chdir("repo")
    (run,) = (repository / "repo" / "runs").iterdir()
    assert "3 verdicts: 3 held" in cli("check", run)[1]


@pytest.mark.parametrize(
    ("model", "options", "grid"),
    [
        (
            "bert-base@random",
            {},
            {"method": ["full", "lora", "lora+checkpoint"], "batch_size": 4, "sequence_length": 128},
        ),
        ("vit-tiny@random", {"methods": ["lora"]}, {"method": ["lora"], "batch_size": 4, "sequence_length": 197}),
        ("my-org/My-Model_7B", {"batch_size": 1}, {"model": "my-org/My-Model_7B", "batch_size": 1}),
        (
            "pkg.models:build",
            {"batch": "pkg.models:batch", "allow_code": True, "sequence_length": 300},
            {"model": "pkg.models:build", "batch": "pkg.models:batch", "sequence_length": 300},
        ),
    ],
)
def test_models_of_every_kind(repository, model, options, grid):
    """A name of the catalogue, images, a name on the hub, a function of one's own; the files say the same cells."""
    start = start_of(
        model,
        options.pop("methods", []),
        options.pop("batch_size", None),
        options.pop("sequence_length", None),
        **options,
    )
    write_all(repository, start.files(), force=False)

    assert grid.items() <= yaml.safe_load((repository / start.suite_file).read_text())["grid"].items()
    suite = load_suite(start.name)
    assert [cell.cell_id for cell in start.cells] == [cell.cell_id for cell in suite.cells]
    matches = {row.match for row in load_budgets(suite.budgets).rows}
    assert {"*", *(cell.label for cell in suite.cells)} == matches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bert-tinny@random",), "init: model: unknown model 'bert-tinny'; did you mean 'bert-tiny'?"),
        (("bert-tiny@random", "--method", "lorra"), "init: method: unknown method 'lorra'; did you mean 'lora'?"),
        (("bert-tiny@random", "--sequence-length", "4096"), "sequence_length 4096 is longer than the 512 positions"),
        (("./nowhere",), "init: model: no model folder 'nowhere'; check the path"),
        (("bert-tiny@random", "--name", "a b"), "--name: 'a b' is no name of a suite; write letters"),
        (("bert-tiny@random", "--name", "a.budgets"), "--name: 'a.budgets' is no name of a suite; write letters"),
        (("bert-tiny@random", "--name=-x"), "--name: '-x' is no name of a suite; write letters"),
        (("bert-tiny@random", "--name", ".."), "--name: '..' is no name of a suite; write letters"),
        (("bert-tiny@random", "--name", ".hidden"), "--name: '.hidden' is no name of a suite; write letters"),
        (("mine:build",), "'mine:build' is Python code, which is imported only when allowed; add --allow-code"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(cli, repository, arguments, message):
    code, out, err = cli("init", *arguments)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert message in err
    assert [] == files_in(repository)


def test_nothing_is_overwritten_unless_forced(cli, repository):
    """One file that is there is enough, and the others are not written either."""
    (repository / "suites").mkdir()
    (repository / FILES[1]).write_text("mine")

    code, _, err = cli("init", "bert-tiny@random", *SMALL)

    assert (2, 1) == (code, err.count("\n"))
    assert f"meftbench: {FILES[1]}: is there already; add --force to overwrite, or another --name or --out\n" == err
    assert [FILES[1]] == files_in(repository)
    assert 0 == cli("init", "bert-tiny@random", *SMALL, "--force")[0]
    assert "mine" not in (repository / FILES[1]).read_text()
    assert 0o644 == stat.S_IMODE((repository / FILES[0]).stat().st_mode)


def test_a_second_suite_has_a_job_of_its_own(cli, repository):
    """The first job stays; with --force, that of a suite is written again where it was."""
    assert 0 == cli("init", "bert-tiny@random")[0]
    first = (repository / FILES[2]).read_text()
    code, out, _ = cli("init", "bert-mini@random", "--method", "lora")

    assert 0 == code
    assert ".github/workflows/memory-bert-mini.yml: written" in out.splitlines()
    assert first == (repository / FILES[2]).read_text()
    assert 0 == cli("init", "bert-tiny@random", "--force")[0]
    assert 0 == cli("init", "bert-mini@random", "--force")[0]
    assert ["memory-bert-mini.yml", "memory.yml"] == files_in(repository / ".github" / "workflows")


def test_all_or_nothing(repository):
    """Where the last of the files cannot be written, neither are the first, nor their folders."""
    (repository / ".github").write_text("a file, where a folder is needed")

    with pytest.raises(UserError, match="cannot be written"):
        write_all(repository, dict.fromkeys(map(repository.__class__, FILES), "text"), force=True)

    assert [".github"] == files_in(repository)
    assert not (repository / "suites").exists()


def test_a_job_for_gitlab(cli, repository):
    """It runs and checks the suite, and gives the verdicts as JUnit."""
    assert 0 == cli("init", "bert-tiny@random", "--gitlab")[0]

    job = yaml.safe_load((repository / ".gitlab" / "memory.yml").read_text())["memory"]
    assert "meftbench run bert-tiny --out runs/memory" in job["script"]
    assert job["script"][-1].startswith(
        f"meftbench check runs/memory --format junit --output {job['artifacts']['reports']['junit']}"
    )
    assert not (repository / ".github").exists()


@pytest.mark.parametrize("gitlab", [False, True])
def test_no_mark_of_a_template_is_left(repository, gitlab):
    """Versions are those that are installed here, without the name of a build."""
    text = start_of("bert-tiny@random", [], None, None, gitlab=gitlab).workflow()

    assert re.search(r"pip install meftbench==\S+ torch==[\d.]+ transformers==\S+ peft==\S+$", text, re.MULTILINE)
    assert not re.search(r"@[A-Z_]+@", text)


@pytest.mark.parametrize("gitlab", [False, True])
@pytest.mark.parametrize("project", ["pyproject.toml", "setup.py", None])
@pytest.mark.parametrize("model", ["my.models:build", "bert-tiny@random"])
def test_a_job_for_code_of_ones_own_installs_the_project(repository, gitlab, project, model):
    """In one command with the versions that were counted with; where there is no project, a line is left to fill in."""
    if project:
        (repository / project).write_text("")
    text = start_of(model, [], None, None, allow_code=True, gitlab=gitlab).workflow()
    own = ":" in model

    assert ("- run: pip install . meftbench==" in text or "- pip install . meftbench==" in text) == bool(
        own and project
    )
    assert ("    # To fill in: what this repository's own code needs" in text) == (own and not project)
    assert "- pip install" in text.replace("run: ", "")
    assert yaml.safe_load(text)


@given(st.text(min_size=1))
def test_every_model_has_a_name_of_a_suite(model):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", _slug(model))


NAMES = st.one_of(
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,9}", fullmatch=True),
    st.sampled_from(["1e5", "true", "null", "0x10", "2026-01-01", "2026-13-45", "1_000", "on", "Y", ".5"[1:]]),
)


@given(NAMES.filter(lambda name: not name.endswith(".budgets")))
def test_the_suite_has_the_name_that_was_given(name):
    """Whatever YAML would read without quotes: a number, a date, a flag."""
    start = start_of("bert-tiny@random", ["full"], None, None, name=name)

    assert name == parse(start.suite())["name"]
    assert f"{name}.budgets.yaml" == parse(start.suite())["budgets"]
    assert isinstance(parse(start.workflow())["name"], str)
