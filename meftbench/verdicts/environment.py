"""Where a run was made, according to its environment.json, and how two environments differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from meftbench.records.store import Run, environment_in


def environment_names(run: Run) -> list[str]:
    """The names of the run's environment, one of which the `environment` of a budgets row has to match.

    First the environment ids of the records, then those of the GPU, such as `h200` and `h200-cu130`; `cpu` without one.
    """
    names = sorted({record.environment_id for record in run.records})
    gpu = gpu_name(run.environment)
    if gpu is None:
        return [*names, "cpu"]
    words = re.sub(r"nvidia|geforce|tesla|\(.*?\)", "", gpu.lower()).split()
    slug = "-".join(words) or gpu.lower()
    cuda = str(_mapping(run.environment, "torch").get("cuda") or "").replace(".", "")
    return [*names, words[0] if words else slug, slug, *([f"{words[0]}-cu{cuda}"] if cuda and words else [])]


def gpu_name(environment: dict[str, Any]) -> str | None:
    """Name of the first GPU; None where there was none."""
    devices = _mapping(environment, "gpus").get("devices")
    first = devices[0] if isinstance(devices, list) and devices else None
    return str(first["name"]) if isinstance(first, dict) and first.get("name") else None


def machine(environment: dict[str, Any]) -> str:
    """The machine as text: its GPU if it has one, processor and cores."""
    host = _mapping(environment, "host")
    cores = f"{host['cores']} cores" if host.get("cores") else ""
    parts = [gpu_name(environment), host.get("cpu") or host.get("machine"), cores]
    return ", ".join(str(part) for part in parts if part) or "unknown machine"


def environments(run: Run) -> dict[str, dict[str, Any]]:
    """The environments of the run's records by id: the one that it began in, and those that it was resumed in."""
    found = {str(run.environment.get("environment_id")): run.environment}
    for environment_id in {record.environment_id for record in run.records} - found.keys():
        file = run.path / f"environment-{environment_id}.json"  # written where a run is resumed (runner/folder.py)
        if file.is_file():
            found[environment_id] = environment_in(file)
    return found


def facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of an environment, as (name, value), such as (packages.torch, 2.13.0)."""
    left_out = ("schema", "environment_id", "comparable", "packages_digest")
    known = {key: value for key, value in environment.items() if key not in left_out}
    return [(name, text) for name, text in _flat(known) if text not in ("None", "[]", "")]


def machines(run: Run) -> str:
    """The machine that a run began on; where it was resumed on others, also how many of its records are from each."""
    first_machine = machine(run.environment)
    counts: Counter[str] = Counter()
    known = environments(run)
    for environment_id, count in Counter(record.environment_id for record in run.records).items():
        if environment_id in known:
            counts[machine(known[environment_id])] += count
    del counts[first_machine]  # leaves out the same machine with other software
    parts = [f"{count} of {len(run.records)} records: {name}" for name, count in counts.items()]
    return f"{first_machine} ({'; '.join(parts)})" if parts else first_machine


def checkout(environment: dict[str, Any]) -> str:
    """The commit that ran, marked as dirty if the checkout had changes; or why the commit is not known."""
    git = _mapping(_mapping(environment, "meftbench"), "git")
    if not git.get("sha"):
        return str(git.get("absent") or "unknown commit")
    return f"{str(git['sha'])[:12]}{' (dirty: with uncommitted changes)' if git.get('dirty') else ''}"


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """A text such as `packages.torch: 2.12 | 2.13` for each key in which two mappings differ.

    Of two environments only `comparable` is looked at: the facts that make their numbers comparable.
    """
    if first.get("comparable") and second.get("comparable"):
        first, second = first["comparable"], second["comparable"]
    left, right = dict(_flat(first)), dict(_flat(second))
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    return [f"{key}: {left.get(key, 'absent')} | {right.get(key, 'absent')}" for key in keys]


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    # A run of another version may lack the key; its report is then written without this fact.
    value = content.get(key)
    return value if isinstance(value, dict) else {}
