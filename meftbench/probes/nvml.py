"""What the driver reports of a GPU, through NVML: memory of processes, clocks, temperature.

Containers, MIG and WDDM hide some of it. Such a metric is absent, with the reason; it neither raises an error nor is
reported as zero (docs/measuring.md 4).
"""

from __future__ import annotations

import os
from typing import Any

import torch

from meftbench.records.record import Metric


class DeviceReading:
    """NVML's view of one device.

    nvml: the pynvml module (tests have a substitute), initialised.  uuid: "GPU-...", since NVML's indices are not
    those of CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

    def memory(self) -> dict[str, Metric]:
        """process_device_bytes, device_used_bytes, device_shared."""
        nvml = self._nvml
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except nvml.NVMLError as error:
            absent = _absent(f"NVML: {error}")
            return {"process_device_bytes": absent, "device_shared": absent, "device_used_bytes": self._used()}
        used = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        if not used:
            # In a container NVML reports process ids of the host, which os.getpid() does not return.
            process = _absent("NVML does not list this process (a container's process ids differ)")
            shared = _absent("NVML does not list this process, so others cannot be told apart")
        else:
            process = _absent("NVML does not tell memory per process here") if used[0] is None else _number(used[0])
            shared = _number(int(len(processes) > 1))
        return {"process_device_bytes": process, "device_used_bytes": self._used(), "device_shared": shared}

    def conditions(self) -> dict[str, Metric]:
        """clocks_mhz, temperature_c, power_w, throttle_reasons."""
        nvml, handle = self._nvml, self._handle
        return {
            "clocks_mhz": self._read(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "temperature_c": self._read(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power_w": self._read(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "throttle_reasons": self._read(lambda: self._throttling()),
        }

    def _throttling(self) -> list[str]:
        nvml = self._nvml
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        names = {
            "power cap": nvml.nvmlClocksThrottleReasonSwPowerCap,
            "hardware slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
            "thermal, software": nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
            "thermal, hardware": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
            "power brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        }
        return [name for name, bit in names.items() if bits & bit]

    def _used(self) -> Metric:
        nvml = self._nvml
        # Version 1 of the call counts what the driver reserves as used.
        return self._read(lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2).used)

    def _read(self, query: Any) -> Metric:
        try:
            return _number(query())
        except self._nvml.NVMLError as error:
            return _absent(f"NVML: {error}")


def open_device(uuid: str) -> DeviceReading | None:
    """NVML's view of the device; None where NVML is not available or does not know the device."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return DeviceReading(pynvml, uuid)
    except pynvml.NVMLError:
        return None


def reading_of(device: torch.device) -> DeviceReading | None:
    """NVML's view of a CUDA device of torch; None as in `open_device`, and for a CPU."""
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return open_device(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _number(value: Any) -> Metric:
    return Metric(value, "measured")


def _absent(why: str) -> Metric:
    return Metric(None, "measured", absent=why)
