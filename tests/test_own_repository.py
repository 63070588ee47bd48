"""What holds other repositories to memory budgets: the example project, the GitHub action, hooks of pre-commit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from action_runner import Job, read_action
from meftbench.cli import app
from meftbench.plan.budgets import load_budgets
from meftbench.plan.suite import load_suite
from meftbench.starting import start_of

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "gated-project"
ACTION = read_action(ROOT / "action.yml")
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
SCRIPTS = [step for step in ACTION["runs"]["steps"] if "run" in step]
# One line, by which every hidden state is held until the next step.
BROKEN = ("last_hidden_state\n", "last_hidden_state\n        self.hidden = hidden\n")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "-p meftbench.pytest_plugin -p no:cacheprovider",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def in_shell(folder, command):
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )


@pytest.fixture
def project(tmp_path):
    """A copy of the example project."""
    folder = tmp_path / "project"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    return folder


def make_it_hold_more(project):
    file = project / "gated" / "model.py"
    text = file.read_text()
    assert BROKEN[0] in text
    file.write_text(text.replace(*BROKEN))


# --- the example ---


@pytest.mark.slow
def test_its_tests_pass_and_fail_by_one_line(project):
    """Tests with budgets, as its README says: the failure names bytes, source, excess, and what is alive."""
    held = in_shell(project, "python -m pytest -q")
    assert "4 passed" in held.stdout, held.stdout + held.stderr

    make_it_hold_more(project)
    exceeded = in_shell(project, "python -m pytest -q")

    assert 1 == exceeded.returncode
    assert "3 failed, 1 passed" in exceeded.stdout
    # 8 × 32 × 64 hidden states in fp32
    assert "baseline_allocated_bytes 850.5 KiB (counted) is over max 786.5 KiB; over by 64.0 KiB" in exceeded.stdout
    assert "What is alive at the peak of forward and backward:\n  512.0 KiB (counted): addmm.default" in exceeded.stdout


@pytest.mark.slow
def test_its_suite_holds_and_fails_by_one_line(project):
    """By the commands of its README."""
    commands = re.findall(r"(?m)^(meftbench \w+ .*?) *#", (project / "README.md").read_text())
    assert ["meftbench run memory --out runs/memory", "meftbench check runs/memory"] == commands
    held = in_shell(project, f"{commands[0]} --quiet && {commands[1]}")
    assert 0 == held.returncode, held.stdout + held.stderr

    make_it_hold_more(project)
    exceeded = in_shell(project, "meftbench run memory --out runs/more --quiet && meftbench check runs/more")

    assert 1 == exceeded.returncode, exceeded.stderr
    assert re.search(r"build/lora/b8/s32\S*: peak_allocated_bytes .*over by 64\.0 KiB", exceeded.stdout)


def test_its_workflow_and_hooks_name_what_there_is():
    """Inputs of the action, its suite, and hooks."""
    (job,) = yaml.safe_load((EXAMPLE / ".github/workflows/memory.yml").read_text())["jobs"].values()
    (step,) = [step for step in job["steps"] if "meftbench" in step["uses"]]
    assert step["with"].keys() <= ACTION["inputs"].keys()
    assert (EXAMPLE / "suites" / f"{step['with']['suite']}.yaml").is_file()
    (repository,) = yaml.safe_load((EXAMPLE / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"] for hook in repository["hooks"]} <= {hook["id"] for hook in HOOKS}


def test_the_page_shows_jobs_as_they_are():
    """Its GitHub workflow gives inputs of the action, its GitLab job is the one `init` writes, its hooks are ours."""
    page = (ROOT / "docs" / "howto" / "own_repository.md").read_text()
    workflow, gitlab, hooks = (yaml.safe_load(block) for block in re.findall(r"(?ms)^```yaml\n(.*?)^```$", page))
    assert workflow["jobs"]["memory"]["steps"][-1]["with"].keys() <= ACTION["inputs"].keys()
    written = yaml.safe_load(start_of("bert-base@random", [], None, None, gitlab=True).workflow())["memory"]
    assert written["script"][1:] == gitlab["memory"]["script"][1:]
    assert written["artifacts"] == gitlab["memory"]["artifacts"]
    assert [hook["id"] for hook in HOOKS] == [hook["id"] for hook in hooks["repos"][0]["hooks"]]


# --- the action ---


def test_the_action_is_whole():
    """Required keys; every input that is used is declared, and the other way round; outputs are those of a step."""
    assert {"name", "description", "inputs", "outputs", "runs"} <= ACTION.keys()
    assert "composite" == ACTION["runs"]["using"]
    assert all(
        {"description"} <= entry.keys() <= {"description", "required", "default"} for entry in ACTION["inputs"].values()
    )
    text = (ROOT / "action.yml").read_text()
    used = set(re.findall(r"\binputs\.([\w-]+)", text))
    assert ACTION["inputs"].keys() == used
    written = {step["id"]: set(re.findall(r'echo "(\w+)=', step["run"])) for step in SCRIPTS if "id" in step}
    for step, output in re.findall(r"steps\.(\w+)\.outputs\.(\w+)", text):
        assert output in written[step]
    for step in ACTION["runs"]["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert "run" not in step or "bash" == step["shell"]


@pytest.mark.parametrize("step", SCRIPTS, ids=lambda step: step["name"])
def test_a_script_is_bash_and_takes_what_is_given_from_its_environment(step):
    """No `${{ }}` within it, which would let a name of a branch be code; variables are set by `env` or GitHub."""
    parsed = subprocess.run(["bash", "-n"], input=step["run"], capture_output=True, text=True)
    assert (0, "") == (parsed.returncode, parsed.stderr)
    assert "${{" not in step["run"]
    variables = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", step["run"]))
    of_github = {"GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ACTION_PATH", "RUNNER_TEMP"}
    assert variables <= step.get("env", {}).keys() | of_github


def test_its_commands_are_commands_of_ours():
    """Verbs and options."""
    verbs = typer.main.get_command(app).commands
    lines = [
        line
        for step in SCRIPTS
        for line in step["run"].replace("\\\n", " ").splitlines()
        if re.search(r"\bmeftbench [a-z]+ ", line) and "notice" not in line
    ]
    assert {"run", "check", "compare", "report", "export"} == {
        re.search(r"\bmeftbench ([a-z]+) ", line)[1] for line in lines
    }
    for line in lines:
        verb, rest = re.search(r"\bmeftbench ([a-z]+) (.*)", line).groups()
        options = {spelled for parameter in verbs[verb].params for spelled in parameter.opts}
        assert {word for word in rest.split() if word.startswith("--")} <= options


@pytest.mark.parametrize(
    ("clone", "shallow", "commits"), [("", "false", 3), ("--depth=2", "true", 2), ("--depth=1", "true", 1)]
)
@pytest.mark.parametrize("base_moved", [True, False])
def test_the_base_branch_is_fetched_without_changing_the_checkouts_history(
    tmp_path, clone, shallow, commits, base_moved
):
    """A whole clone stays whole, one of two commits has two; the run of the base branch is of its last commit."""
    commit = "mkdir -p kept && date +%N >> kept/records.jsonl && git add -A && git commit -qm change"
    made = in_shell(
        tmp_path,
        f"git init -q -b main project && cd project && {' && '.join([commit] * 3)} && git branch change && cd .. && "
        f"git clone -q {clone} --no-single-branch -b change file://$PWD/project clone && cd project && "
        f"{commit if base_moved else ':'} && git rev-parse HEAD && mkdir ../temporary",
    )
    assert 0 == made.returncode, made.stderr
    github = {"event_name": "pull_request", "base_ref": "main"}
    job = Job(ACTION, github, tmp_path / "clone", tmp_path / "temporary", ENVIRONMENT)
    step = next(step for step in SCRIPTS if step.get("id") == "base")

    context = {"github": github, "inputs": {"suite": "memory", "base": "kept"}, "steps": {}}

    assert job.step(step, context), job.log
    assert f"{tmp_path}/temporary/meftbench-base/kept" == context["steps"]["base"]["outputs"]["run"]
    history = in_shell(tmp_path / "clone", "git rev-parse --is-shallow-repository; git rev-list --count HEAD")
    base = in_shell(tmp_path / "temporary" / "meftbench-base", "git rev-parse HEAD")
    assert [shallow, str(commits)] == history.stdout.split()
    assert made.stdout.split()[-1] == base.stdout.strip()


GH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$GH_FOLDER/calls"
for word in "$@"; do case "$word" in body=@*) cp "${word#body=@}" "$GH_FOLDER/body" ;; esac; done
case "$*" in *--jq*) cat "$GH_FOLDER/comments"; exit ;; esac
exit "$(cat "$GH_FOLDER/code")"
"""


@pytest.fixture
def pull_request(project, tmp_path):
    """A job of a pull request in a clone, whose base branch has the example; `gh` only notes what it is asked."""
    gh = tmp_path / "gh"
    gh.mkdir()
    (gh / "gh").write_text(GH)
    (gh / "gh").chmod(0o755)
    (gh / "comments").write_text("")
    (gh / "code").write_text("0")
    suite = project / "suites" / "memory.yaml"
    suite.write_text(re.sub(r"method: .*", "method: lora", suite.read_text()))
    budgets = project / "suites" / "memory.budgets.yaml"
    kept = [
        line for line in budgets.read_text().splitlines(True) if "/full/" not in line and "+checkpoint/" not in line
    ]
    budgets.write_text("".join(kept))
    made = in_shell(project, "git init -q -b main . && git add -A && git commit -qm base")
    assert 0 == made.returncode, made.stderr
    made = in_shell(tmp_path, "git clone -q project clone && cd clone && git checkout -q -b change")
    assert 0 == made.returncode, made.stderr
    environment = ENVIRONMENT | {"PATH": f"{gh}{os.pathsep}{ENVIRONMENT['PATH']}", "GH_FOLDER": str(gh)}
    github = {"event_name": "pull_request", "base_ref": "main", "repository": "someone/project", "token": "t0ken"}
    github |= {"event": {"pull_request": {"number": 7}}}
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return Job(ACTION, github, tmp_path / "clone", temporary, environment)


def calls(tmp_path):
    file = tmp_path / "gh" / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_pull_request_that_holds_more_fails_and_is_told(pull_request, tmp_path):
    """The comment is a table of what grew; the report and the badge are uploaded; the job fails at its end."""
    make_it_hold_more(pull_request.folder)

    succeeded, outputs = pull_request.run(suite="memory")

    assert not succeeded, pull_request.log
    assert {"run": "runs/memory", "code": "1", "grew": "true"} == outputs
    assert "::error file=suites/memory.budgets.yaml,line=" in pull_request.log
    looked, wrote = calls(tmp_path)
    assert looked.startswith("api repos/someone/project/issues/7/comments --paginate --jq ")
    assert wrote.startswith("api --method POST repos/someone/project/issues/7/comments --field body=@")
    body = (tmp_path / "gh" / "body").read_text()
    assert body.startswith(
        "<!-- meftbench: memory -->\n### Memory of training steps (counted), against the base branch\n\n"
    )
    assert re.search(r"\| worse \| gated.*peak\\_allocated\\_bytes \|", body)
    run = pull_request.folder / "runs" / "memory"
    assert "red" == json.loads((run / "badge.json").read_text())["color"]
    assert (run / "report.html").is_file()
    assert ("actions/upload-artifact@v4", {"name": "memory-report", "path": "runs/memory"}) in pull_request.used


@pytest.mark.slow
def test_a_pull_request_that_changes_nothing_says_nothing(pull_request, tmp_path):
    """No comment is written; where there is one, it is brought up to date. A token that may only read fails no job."""
    succeeded, outputs = pull_request.run(suite="memory")
    assert succeeded, pull_request.log
    assert {"run": "runs/memory", "code": "0", "grew": "false"} == outputs
    assert 1 == len(calls(tmp_path))

    shutil.copytree(pull_request.folder / "runs" / "memory", pull_request.folder / "committed")
    committed = in_shell(
        pull_request.folder,
        "rm -rf runs; git worktree prune; git add -A && git commit -qm run && git push -q origin HEAD:refs/heads/base",
    )
    assert 0 == committed.returncode, committed.stderr
    shutil.rmtree(pull_request.temporary / "meftbench-base")
    in_shell(pull_request.folder, "git worktree prune")
    (tmp_path / "gh" / "comments").write_text("1234\n5678\n")
    (tmp_path / "gh" / "code").write_text("1")
    pull_request.github["base_ref"] = "base"
    succeeded, outputs = pull_request.run(suite="memory", base="committed")

    assert succeeded, pull_request.log
    assert "false" == outputs["grew"]
    assert "api --method PATCH repos/someone/project/issues/comments/1234 " in calls(tmp_path)[-1]
    assert "::notice title=meftbench::the comment could not be written" in pull_request.log


@pytest.mark.slow
def test_a_first_pull_request_has_nothing_to_be_compared_with(pull_request, tmp_path):
    """The base branch does not have the suite yet: its budgets are held all the same."""
    in_shell(pull_request.folder, "cp suites/memory.yaml suites/new.yaml")

    succeeded, outputs = pull_request.run(suite="new")

    assert succeeded, pull_request.log
    assert {"run": "runs/memory", "code": "0", "grew": ""} == outputs
    assert "the base branch has no run of this suite to compare with" in pull_request.log
    assert [] == calls(tmp_path)


def test_a_suite_that_is_not_valid_ends_the_job(pull_request):
    """With our line, and without a report of a run that there is not."""
    succeeded, outputs = pull_request.run(suite="memmory")

    assert not succeeded
    assert "run: unknown suite 'memmory'; did you mean 'memory'?" in pull_request.log
    assert "" == outputs["code"]
    assert not [uses for uses, _ in pull_request.used if "upload" in uses]


# --- hooks ---


def test_hooks_have_what_pre_commit_needs():
    assert all({"id", "name", "entry", "language"} <= hook.keys() for hook in HOOKS)
    suites = HOOKS[0]
    chosen = [
        path for path in ("suites/a.yaml", "suites/a.budgets.yaml", "docs/a.yaml") if re.search(suites["files"], path)
    ]
    assert ["suites/a.yaml"] == [path for path in chosen if not re.search(suites["exclude"], path)]


def test_the_hook_reads_every_changed_suite(project):
    """pre-commit splits the entry like a shell, and adds the files; a fault in one is said, and the others are read."""
    entry = shlex.split(HOOKS[0]["entry"])
    (project / "suites" / "bad.yaml").write_text(
        (project / "suites" / "memory.yaml").read_text().replace("lora", "lorra", 1)
    )
    environment = os.environ | ENVIRONMENT

    good = subprocess.run([*entry, "suites/memory.yaml"], cwd=project, env=environment, capture_output=True, text=True)
    bad = subprocess.run(
        [*entry, "suites/bad.yaml", "suites/memory.yaml"], cwd=project, env=environment, capture_output=True, text=True
    )

    assert (0, "", "") == (good.returncode, good.stdout, good.stderr)
    assert 2 == bad.returncode
    assert "suites/bad.yaml:13: grid.method[1]: unknown method 'lorra'; did you mean 'lora'?" in bad.stderr


def test_the_examples_budgets_are_of_its_suite(monkeypatch):
    """Rows name the cells that there are."""
    monkeypatch.chdir(EXAMPLE)
    suite = load_suite("memory")
    assert {"*", *(cell.label for cell in suite.cells)} == {row.match for row in load_budgets(suite.budgets).rows}
