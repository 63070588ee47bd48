"""`meftbench doctor`: what this machine can measure, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from meftbench.cli.estimate import folded
from meftbench.cli.options import Quiet, progress, say_next
from meftbench.cli.output import put, put_json
from meftbench.errors import UserError
from meftbench.escapes import path_text

NEEDED = ("torch", "transformers", "peft", "safetensors")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure how fast the device is, about a minute, and write a profile.")
    ] = False,
    out: Annotated[Path, typer.Option(help="With --calibrate: the file, for --profile.")] = Path("calibrated.yaml"),
    device: Annotated[
        str | None, typer.Option(help="With --calibrate: cpu or cuda. Default: cuda where there is one.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --calibrate: of the CPU. Default: its cores.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Say what this machine can measure. A missing GPU is a fact, not a failure: exits 0.

    With --calibrate, step times can then be predicted for this device: meftbench estimate ... --profile FILE.
    """
    if calibrate:
        from meftbench.runner.calibrate import calibrate as write_profile

        profile = write_profile(out, device, threads, progress(quiet))
        if as_json:
            put_json(profile)
        else:
            put(_calibrated(out, profile))
        say_next(("plan", "MODEL", "--profile", out), as_json=as_json)
        return
    if given := [name for name, value in (("--device", device), ("--threads", threads)) if value is not None]:
        raise UserError(f"doctor {given[0]}", "only measuring takes it", "add --calibrate, or leave it out")
    result = findings()
    if as_json:
        put_json(result, indent=2, default=str)
    else:
        put(*folded(rendered(result).splitlines()))
    say_next(("run", "smoke"), ("doctor", "--calibrate"), ("list", "suites"), as_json=as_json)


def _calibrated(out: Path, profile: dict[str, Any]) -> str:
    """Some of the speeds of a profile that was written to `out`, as lines of text."""
    speeds = profile["speeds"]
    lines = [f"{profile['device']}, measured:"]
    lines += [f"  {dtype:<20}{rate['rate'] / 1e9:12,.0f} GFLOP/s" for dtype, rate in speeds["matrix"].items()]
    lines += [f"  {'memory':<20}{max(rate for _, rate in speeds['memory']['elementwise']) / 1e9:12,.0f} GB/s"]
    lines += [f"  {'start of a kernel':<20}{speeds['launch_s'] * 1e6:12,.1f} µs"]
    return "\n".join(
        [*lines, f"written to {path_text(out)}: meftbench estimate MODEL METHOD ... --profile {path_text(out)}"]
    )


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
