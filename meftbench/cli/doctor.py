"""`meftbench doctor`: what this machine can measure."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

NEEDED = ("torch", "transformers", "peft", "safetensors")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what this machine can measure. A missing GPU is a fact, not a failure: exits 0."""
    result = findings()
    print(json.dumps(result, indent=2, ensure_ascii=False, default=str) if as_json else rendered(result))


def findings(nvml: Any = None) -> dict[str, Any]:
    """Host, packages, GPUs, what the worker process reports of torch, and what can be measured with them.

    nvml: replaces the module `pynvml`.
    """
    from dataclasses import asdict

    from meftbench.runner import gpus, host
    from meftbench.runner.environment import versions

    devices = gpus.read(nvml)
    torch = torch_facts()
    counted = torch.get("absent")
    cuda = devices.absent or counted
    if cuda is None and torch.get("torch_cuda", "unknown") is None:
        cuda = "this torch is built without CUDA: install a CUDA build of it"
    return {
        "measures": {"counted": counted or "yes", "cuda": cuda or "yes"},
        "packages": versions(),
        "host": host.facts() | {"available_bytes": host.available_bytes()},
        "gpus": asdict(devices),
        "torch": torch,
    }


def torch_facts() -> dict[str, Any]:
    """What the worker reports of torch; {"absent": reason} where the worker cannot start."""
    import os
    import tempfile
    from pathlib import Path

    from meftbench.errors import UserError
    from meftbench.plan.protocol import Protocol
    from meftbench.runner import host
    from meftbench.runner.process import Worker, worker_environment

    with tempfile.TemporaryDirectory() as folder:
        environment = worker_environment(Protocol(), host.cores(), os.environ)
        try:
            worker = Worker(environment, Path(folder) / "worker.log")
        except UserError as error:
            return {"absent": error.what}
        worker.close()
        return worker.facts


def rendered(result: dict[str, Any]) -> str:
    """The result of `findings` as lines of text."""
    from meftbench.units import format_bytes

    host, gpus = result["host"], result["gpus"]
    limit = host["cgroup_memory_limit_bytes"]
    lines = [f"{name:<14}{version or _missing(name)}" for name, version in result["packages"].items()]
    memory = f"{format_bytes(host['memory_bytes'])}, {format_bytes(host['available_bytes'])} free for a cell"
    lines += [
        f"{'python':<14}{host['python']}",
        f"{'cpu':<14}{host['cpu']}, {host['cores']} cores",
        f"{'memory':<14}{memory}",
        f"{'cgroup limit':<14}{format_bytes(limit) if limit is not None else 'none'}",
        f"{'NVML':<14}{'driver ' + gpus['driver'] if gpus['driver'] else gpus['absent']}",
    ]
    for device in gpus["devices"]:
        total = format_bytes(device["memory_bytes"]) if device["memory_bytes"] is not None else "memory unknown"
        refused = "".join(f"; {name}: {reason}" for name, reason in device.get("refused", {}).items())
        lines.append(f"{'GPU ' + str(device['index']):<14}{device['name']}, {total}{refused}")
    for what, answer in result["measures"].items():
        lines.append(f"{what:<14}{'can be measured' if answer == 'yes' else 'cannot be measured: ' + answer}")
    return "\n".join(lines)


def _missing(name: str) -> str:
    return "missing: pip install meftbench" if name in NEEDED else "not installed"
