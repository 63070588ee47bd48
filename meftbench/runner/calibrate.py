"""A profile of the device at hand with its measured speeds: what `meftbench doctor --calibrate` writes.

The measuring itself runs in a worker process with torch (meftbench.prediction.calibration).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from meftbench.catalogue.profiles import PROFILES, Profile, find_device
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.records.store import write_whole
from meftbench.runner import host
from meftbench.runner.predictions import ask

DEVICES = ("cpu", "cuda")


def calibrate(
    out: Path, device: str | None = None, threads: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure how fast the device is, and write a profile with that to the YAML file `out`; the profile's content.

    device: "cpu" or "cuda"; None: CUDA where there is one.  threads: of the CPU; None: its cores.
    Raises UserError: the file cannot be written, or has a name that `--profile` would not take for a file; there is no
    such device.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(str(out), "a profile is a YAML file", f"name it {out.with_suffix('.yaml').name}")
    if device not in (None, *DEVICES):
        raise UserError("--device", f"unknown device {device!r}", f"one of: {', '.join(DEVICES)}")
    write_whole(out, "")  # before a minute of measuring
    try:
        request = {"device": device}
        answer = ask("calibrate", request, tell, threads=threads or host.cores())
        content = _cpu_content(answer) if answer["device"] == "cpu" else _gpu_content(answer)
        write_whole(out, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=118))
        find_device(str(out.absolute()))  # what others are to read is read here first
    except BaseException:
        if out.exists() and not out.read_text(encoding="utf-8"):
            out.unlink()
        raise
    return content


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-") or "cpu"


def _cpu_content(answer: dict[str, Any]) -> dict[str, Any]:
    facts = host.facts()
    memory = min(facts["memory_bytes"], facts["cgroup_memory_limit_bytes"] or facts["memory_bytes"])
    processor = f"{facts['cpu']}, {answer['speeds']['threads']} threads"
    start = {"schema": 1, "kind": "cpu", "name": _slug(processor), "device": processor}
    return {**start, "memory_bytes": memory, "speeds": answer["speeds"]}


def _gpu_content(answer: dict[str, Any]) -> dict[str, Any]:
    """The shipped profile of the card with the measured speeds; of a card without one what torch knows of it."""
    facts: dict[str, Any] = answer["facts"]
    known = next((profile for profile in PROFILES.values() if profile.device == facts["device"]), None)
    if known is not None:
        content = known.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"speeds"})
        return {**content, "name": f"{known.name}-calibrated", "speeds": answer["speeds"]}
    same = [profile for profile in PROFILES.values() if profile.compute_capability == facts["compute_capability"]]
    if not same:
        what = f"nothing is known of devices of compute capability {facts['compute_capability']}"
        raise UserError(facts["device"], what, "write a profile by hand (CONTRIBUTING.md)", NOT_COMPARABLE)
    assumed: Profile = same[0]
    fields = ("context_bytes", "cublas_workspace_bytes", "cublaslt_workspace_bytes")
    return {
        **{"schema": 1, "name": _slug(facts["device"]), **facts},
        **{name: getattr(assumed, name) for name in fields},
        "verified": False,
        "speeds": answer["speeds"],
        "sources": [
            f"{', '.join(facts)}: torch.cuda.get_device_properties",
            f"{', '.join(fields)}: profile {assumed.name}, of the same compute capability",
        ],
    }
