"""Stands in for the module `pynvml`: a machine with the devices a test describes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class FakeNvml:
    """devices: name of each.  refuses: functions that raise.  busy: pids on every device."""

    NVMLError = NVMLError

    def __init__(self, *devices: str, refuses: tuple[str, ...] = (), busy: tuple[int, ...] = ()) -> None:
        self.devices, self.refuses, self.busy = devices, refuses, busy

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "refuses"):
            return self._refuse
        return object.__getattribute__(self, name)

    def _refuse(self, *_: object) -> None:
        raise NVMLError("Not Supported")

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.devices[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * 2**30)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetEccMode(self, handle: int) -> tuple[int, int]:
        return 1, 1

    def nvmlDeviceGetPersistenceMode(self, handle: int) -> int:
        return 1

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        return 0, 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.busy]
