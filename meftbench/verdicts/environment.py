"""Where a run was made, from its environment.json, and in what two of them differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from meftbench.records.store import Run

# What differs between any two runs and says nothing about the machine.
_PASSING = (
    "environment_id",
    "started_at",
    "finished_at",
    "date",
    "time",
    "hostname",
    "host",
    "git",
    "pid",
    "captured_at",
)


def environment_names(run: Run) -> list[str]:
    """What a row's `environment` may match: the id, the name if it has one, and GPU-cuVERSION (`h200-cu130`)."""
    ids = {record.environment_id for record in run.records}
    names = [*sorted(ids), *(str(run.environment[key]) for key in ("environment_id", "name") if key in run.environment)]
    gpu = find(run.environment, "gpu_name", "name", within=("gpu", "gpus", "device", "cuda"))
    cuda = find(run.environment, "cuda", "build_cuda", "cuda_version", within=("torch", "versions"))
    if isinstance(gpu, str):
        short = re.sub(r"nvidia|geforce|tesla|\(.*?\)", "", gpu.lower()).split()
        slug = "-".join(short) or gpu.lower()
        names += [slug, *([f"{slug}-cu{re.sub('[^0-9]', '', cuda)}"] if isinstance(cuda, str) else [])]
    return names


def find(content: Any, *keys: str, within: tuple[str, ...] = ()) -> Any:
    """The first of `keys` that holds something, at the top or below one of `within` (a mapping, or a list of them)."""
    if not isinstance(content, dict):
        return None
    places: list[Any] = [content[name] for name in within if name in content]
    places = [place[0] if isinstance(place, list) and place else place for place in places]
    for place in [*places, content]:
        for key in keys:
            if isinstance(place, dict) and place.get(key) not in (None, "", {}, []):
                return place[key]
    return None


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """`torch.version: 2.12 | 2.13` for each fact in which two environments differ, in the order of the first."""
    left, right = dict(_flat(first)), dict(_flat(second))
    named = [key for key in {**left, **right} if key.split(".")[0] not in _PASSING]
    return [
        f"{key}: {left.get(key, 'absent')} | {right.get(key, 'absent')}"
        for key in named
        if left.get(key) != right.get(key)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
