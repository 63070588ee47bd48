"""Facts about the host: its cores and memory, and how much of them its container allows."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")
# Files of cgroup versions 2 and 1 with the bytes that may be used, and those that are used.
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
# Files with the CPU time that may be used in each period, and the period, in microseconds; "max" and -1: no limit.
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
# Names in /proc/cpuinfo of extensions that multiply in bf16: two on x86, the last on ARM.
_BF16_PRODUCTS = {"avx512_bf16", "amx_bf16", "bf16"}
# cgroup version 1 writes "no limit" as a number near 2⁶³.
_UNLIMITED = 2**60
# The share of the free memory that cells may take; the rest is kept for other processes.
RESERVE = 0.95


def cores(root: Path = CGROUP) -> int:
    """CPU cores this process may use: those it may run on, or the container's share of them if that is less."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cgroup_cores(root)
    return usable if share is None else max(1, min(usable, int(share)))


def cgroup_cores(root: Path = CGROUP) -> float | None:
    """CPU time that the container may use, in cores (may be fractional); None where no limit is set."""
    for names in _QUOTAS:
        try:
            quota, period = " ".join((root / name).read_text(encoding="ascii").strip() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            return int(quota) / int(period)
    return None


def bf16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor multiplies in bf16; None where the system has no list of its extensions (Linux has)."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    listed = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return bool(listed[0] & _BF16_PRODUCTS) if listed else None


def cgroup_memory(root: Path = CGROUP) -> tuple[int, int] | None:
    """Bytes that the container may use, and bytes that it uses; None where no limit is set."""
    for limit, usage in _LIMITS:
        try:
            maximum, used = (root / limit).read_text(encoding="ascii"), (root / usage).read_text(encoding="ascii")
        except OSError:
            continue
        if maximum.strip().isdigit() and int(maximum) < _UNLIMITED:
            return int(maximum), int(used)
    return None


def available_bytes(root: Path = CGROUP) -> int:
    """Bytes a process may still take: what the machine has left, or its container if that is less."""
    machine = int(psutil.virtual_memory().available)
    container = cgroup_memory(root)
    available = machine if container is None else min(machine, max(0, container[0] - container[1]))
    return int(available * RESERVE)


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
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def _container() -> bool:
    return (
        Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    )
