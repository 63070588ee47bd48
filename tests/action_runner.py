"""Runs the shell steps of a composite GitHub action as GitHub does: inputs, conditions, outputs, environment."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_NAME = re.compile(r"\b(?:inputs|github|steps)(?:\.[\w-]+)+")


@dataclass
class Job:
    """One run of an action. github: its context.  folder: the checkout.  temporary: RUNNER_TEMP.

    used: the actions that the steps name, with their inputs.  log: what the scripts printed.
    """

    action: dict[str, Any]
    github: dict[str, Any]
    folder: Path
    temporary: Path
    environment: dict[str, str]
    skip: tuple[str, ...] = ("Install",)
    used: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    log: str = ""

    def run(self, **inputs: str) -> tuple[bool, dict[str, str]]:
        """Whether all steps ended well, and the outputs. inputs: with `_` for `-`."""
        given = {name: str(entry.get("default", "")) for name, entry in self.action["inputs"].items()}
        given |= {name.replace("_", "-"): text for name, text in inputs.items()}
        context: dict[str, Any] = {"github": self.github, "steps": {}}
        context["inputs"] = {name: self.text(text, context) for name, text in given.items()}
        succeeded = True
        for step in self.action["runs"]["steps"]:
            if self.runs(step, context, succeeded):
                succeeded = self.step(step, context) and succeeded
        outputs = {name: self.text(entry["value"], context) for name, entry in self.action["outputs"].items()}
        return succeeded, outputs

    def runs(self, step: dict[str, Any], context: dict[str, Any], succeeded: bool) -> bool:
        """Whether the condition of a step holds; a step after a failure needs `always()` in it."""
        condition = step.get("if", "true")
        python = _NAME.sub(lambda name: repr(looked_up(name[0], context)), condition)
        python = python.replace("&&", " and ").replace("||", " or ").replace("true", "True")
        holds = eval(python, {"always": lambda: True})
        return bool(holds) and (succeeded or "always()" in condition)

    def step(self, step: dict[str, Any], context: dict[str, Any]) -> bool:
        """Run a step, note its outputs, and return whether it ended well."""
        if step.get("name") in self.skip:
            return True
        if "uses" in step:
            self.used.append((step["uses"], {k: self.text(v, context) for k, v in step.get("with", {}).items()}))
            return True
        outputs = self.temporary / "outputs"
        outputs.write_text("")
        variables = {name: self.text(text, context) for name, text in step.get("env", {}).items()}
        variables |= {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(self.temporary / "summary.md")}
        variables |= {"RUNNER_TEMP": str(self.temporary)}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        ended = subprocess.run(
            command, cwd=self.folder, env=os.environ | self.environment | variables, capture_output=True, text=True
        )
        self.log += ended.stdout + ended.stderr
        written = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
        outcome = "failure" if ended.returncode else "success"
        context["steps"][step.get("id", step["name"])] = {"outputs": written, "outcome": outcome}
        return not ended.returncode

    def text(self, text: str, context: dict[str, Any]) -> str:
        """The text with the value of each `${{ name }}`."""
        return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda mark: str(looked_up(mark[1], context)), text)


def looked_up(name: str, context: dict[str, Any]) -> Any:
    """The value of `inputs.suite` and the like; "" where there is none, as on GitHub."""
    value: Any = context
    for part in name.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return value


def read_action(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content
