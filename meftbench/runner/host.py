"""What the host is and what it can give: cores, memory, the limits of the container."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")
# Versions 2 and 1 of the same two facts: the most that may be used, and what is used.
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
# Microseconds of a period that may be used, and the period; "max" and -1: no limit.
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
# As Linux calls them: on x86 the two extensions, on ARM the one.
_BF16_PRODUCTS = {"avx512_bf16", "amx_bf16", "bf16"}
# Version 1 writes "no limit" as a number near 2⁶³.
_UNLIMITED = 2**60
# Kept for the rest of the machine when memory is given to a cell.
RESERVE = 0.95


def cores(root: Path = CGROUP) -> int:
    """CPU cores this process may use: those it may run on, or the container's share of them if that is less."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cgroup_cores(root)
    return there if share is None else max(1, min(there, int(share)))


def cgroup_cores(root: Path = CGROUP) -> float | None:
    """Cores' worth of time that the container may use; None where no limit is set."""
    for names in _QUOTAS:
        try:
            quota, period = " ".join((root / name).read_text(encoding="ascii").strip() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            return int(quota) / int(period)
    return None


def bf16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor multiplies in bf16; None where the system does not list what it can do (Linux does)."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    listed = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return bool(listed[0] & _BF16_PRODUCTS) if listed else None


def cgroup_memory(root: Path = CGROUP) -> tuple[int, int] | None:
    """Bytes the container may use and uses; None where no limit is set."""
    for limit, usage in _LIMITS:
        try:
            most, used = (root / limit).read_text(encoding="ascii"), (root / usage).read_text(encoding="ascii")
        except OSError:
            continue
        if most.strip().isdigit() and int(most) < _UNLIMITED:
            return int(most), int(used)
    return None


def available_bytes(root: Path = CGROUP) -> int:
    """Bytes a process may still take: what the machine has left, or its container if that is less."""
    machine = int(psutil.virtual_memory().available)
    container = cgroup_memory(root)
    left = machine if container is None else min(machine, max(0, container[0] - container[1]))
    return int(left * RESERVE)


def facts() -> dict[str, Any]:
    """Host facts for environment.json; memory in bytes."""
    container = cgroup_memory()
    return {
        "name": socket.gethostname(),
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "bf16_products": bf16_products(),
        "cores": cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "cgroup_memory_limit_bytes": container[0] if container else None,
        "container": _container(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _container() -> bool:
    return (
        Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    )
