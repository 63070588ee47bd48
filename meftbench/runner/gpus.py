"""What the NVIDIA driver reports of the GPUs, without CUDA. A fact that it refuses is None: no error, and no zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml

from meftbench.catalogue.profiles import find_profile
from meftbench.errors import NOT_COMPARABLE, UserError


@dataclass(frozen=True)
class Gpus:
    """The devices in the driver's order; where there are none, `absent` says why.

    devices: index, uuid, name, memory_bytes, ... of each; a fact that the driver refuses is None, with the reason in
        `refused`.
    """

    devices: list[dict[str, Any]] = field(default_factory=list)
    driver: str | None = None
    absent: str | None = None


def read(nvml: Any = None) -> Gpus:
    """Ask the driver through `pynvml`, or through `nvml`, which stands in for that module."""
    nvml = nvml or pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus(absent=f"no NVIDIA driver answers ({error})")
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        devices = [_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        return Gpus(devices, driver, None if devices else "the NVIDIA driver lists no device")
    except nvml.NVMLError as error:
        return Gpus(absent=f"the NVIDIA driver refuses ({error})")
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    facts: dict[str, Callable[[], Any]] = {
        "uuid": lambda: _text(nvml.nvmlDeviceGetUUID(handle)),
        "name": lambda: _text(nvml.nvmlDeviceGetName(handle)),
        "memory_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "compute_capability": lambda: ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0]),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "processes": lambda: [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)],
    }
    device: dict[str, Any] = {"index": index}
    refused = {}
    for name, ask in facts.items():
        try:
            device[name] = ask()
        except nvml.NVMLError as error:
            # A driver in a container, on a MIG slice or under Windows refuses some of the facts (docs/measuring.md 4).
            device[name], refused[name] = None, str(error)
    return device | ({"refused": refused} if refused else {})


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def cards(gpus: Gpus, visible: str, names: Iterable[str]) -> set[str]:
    """Those of `names`, of device profiles, whose card is the device `visible`, a value of CUDA_VISIBLE_DEVICES.

    A card is told by the product's name and, since some products were made with several sizes of memory, by that.
    """
    found = set()
    for device in gpus.devices:
        if visible not in (str(device["uuid"]), str(device["index"])):
            continue
        for name in names:
            profile = find_profile(name)
            same_memory = abs((device["memory_bytes"] or 0) - profile.memory_bytes) <= 0.05 * profile.memory_bytes
            if device["name"] == profile.device and same_memory:
                found.add(name)
    return found


def slots(gpus: Gpus, indices: tuple[int, ...], jobs: int, environment: Mapping[str, str]) -> list[str]:
    """One value of CUDA_VISIBLE_DEVICES for each cell that may run at a time.

    The values are UUIDs where they are known, since CUDA may count the devices in another order than the driver.
    indices: as `nvidia-smi` shows them; empty: the first `jobs` devices that this process may see.

    Raises UserError (exit 4) where there is no device, or none of that index.
    """
    if gpus.absent:
        raise UserError(
            "device cuda", gpus.absent, "use `--device counted`, which needs no GPU", exit_code=NOT_COMPARABLE
        )
    names = {device["index"]: str(device["uuid"] or device["index"]) for device in gpus.devices}
    for index in indices:
        if index not in names:
            available = ", ".join(map(str, sorted(names)))
            raise UserError("--gpus", f"there is no GPU {index}", f"this machine has: {available}", NOT_COMPARABLE)
    if indices:
        return [names[index] for index in indices]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(names.values())[:jobs]
    chosen = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not chosen:
        cure = "unset it, or use `--device counted`"
        raise UserError("device cuda", f"CUDA_VISIBLE_DEVICES is {visible!r}", cure, NOT_COMPARABLE)
    return chosen[:jobs]


def refuse_shared(gpus: Gpus, slots: list[str]) -> None:
    """Raises UserError (exit 4) where another process computes on a device of `slots` (`exclusive` of the protocol)."""
    for device in gpus.devices:
        if device["processes"] and {str(device["uuid"]), str(device["index"])} & set(slots):
            what = f"is in use by process {', '.join(map(str, device['processes']))}"
            cure = "wait for it, choose another with --gpus, or set `exclusive: false` in the protocol"
            raise UserError(f"GPU {device['index']} ({device['name']})", what, cure, NOT_COMPARABLE)
