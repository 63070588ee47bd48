"""environment.json: the machine and software of a run (docs/measuring.md 2). Torch is not imported here."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import meftbench
from meftbench.plan.identity import digest
from meftbench.runner import host
from meftbench.runner.gpus import Gpus

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "triton",
    "flash-attn",
    "bitsandbytes",
    "numpy",
    "pandas",
)
_VARIABLES = re.compile(r"(PYTORCH|TORCH|CUDA|CUBLAS|CUDNN|NCCL|NVIDIA|OMP|MKL|KMP|HF|TRANSFORMERS)_")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|AUTH", re.IGNORECASE)
_PACKAGE = Path(meftbench.__file__).parent


def environment(
    gpus: Gpus, torch_facts: Mapping[str, Any], variables: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Everything known of the machine and the software.

    `environment_id` is the digest of `comparable`: the facts that must agree for measured numbers to be comparable.
    torch_facts: what the worker reports of torch.  variables: of the shell; secrets and home paths are redacted.
    """
    machine, packages = host.facts(), versions()
    comparable = {
        "machine": machine["machine"],
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "packages": {name: packages[name] for name in ("torch", "transformers", "peft")},
        "driver": gpus.driver,
        "gpus": [{key: device[key] for key in ("name", "memory_bytes", "mig")} for device in gpus.devices],
    }
    return {
        "schema": 1,
        "environment_id": digest(comparable),
        "comparable": comparable,
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "meftbench": {"version": meftbench.__version__, "code_digest": code_digest(), "git": git_facts()},
        "host": machine,
        "gpus": asdict(gpus),
        "torch": dict(torch_facts),
        "packages": packages,
        "packages_digest": packages_digest(),
        "variables": {name: value for name, value in redacted(variables).items() if _VARIABLES.match(name)},
    }


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each package; None where it is not installed."""
    installed: dict[str, str | None] = {}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def packages_digest() -> str:
    """Hash of every installed distribution and its version, as `pip freeze` would list them."""
    return digest(sorted({f"{distribution.name}=={distribution.version}" for distribution in metadata.distributions()}))


def redacted(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables, without the values of secrets, and with the home folder as `~`."""
    home = str(Path.home())
    return {
        name: "<redacted>" if _SECRET.search(name) else value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(variables.items())
    }


@cache
def code_digest() -> str:
    """Hash of the program's own source files: two runs with the same digest ran the same code."""
    summary = hashlib.blake2b(digest_size=8)
    for file in sorted(_PACKAGE.rglob("*.py")):
        summary.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return summary.hexdigest()


def git_facts(package: Path = _PACKAGE) -> dict[str, Any]:
    """Commit, branch and local changes of the checkout the program runs from; `absent` says why there are none.

    diff_digest: hash of the difference to the commit; None where there is none.
    """
    try:
        # Fails for an installed copy that lies inside another project's repository, such as in a virtual environment.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        difference = _git(package, "diff", "HEAD", "--", ".")
        return {
            "sha": _git(package, "rev-parse", "HEAD").strip(),
            "branch": _git(package, "rev-parse", "--abbrev-ref", "HEAD").strip(),
            "dirty": bool(_git(package, "status", "--porcelain", "--", ".")),
            "diff_digest": digest(difference) if difference else None,
        }
    except FileNotFoundError:
        return {"absent": "git is not installed"}
    except subprocess.CalledProcessError:
        return {"absent": "not run from a git checkout"}
    except subprocess.TimeoutExpired:
        return {"absent": "git did not answer"}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=10).stdout
