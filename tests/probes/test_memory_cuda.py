"""The CUDA probe against a driver of its own making: an allocator that answers from counted bytes, and a fake NVML."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from meftbench.probes import memory_cuda, nvml
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.memory_cuda import measure_memory
from meftbench.probes.storage_counter import CATEGORIES, StorageCounter
from tests.models import a_step

WORKSPACE = 1_000_448  # what a library keeps inside torch's allocator, unseen by the counter
SLACK = 4096  # active and reserved above allocated


class CountingAllocator:
    """Answers as the CUDA caching allocator would if it held what a StorageCounter has seen."""

    def __init__(self, step):
        self.counter = StorageCounter()
        for tensor in [*step.model.parameters(), *step.model.buffers(), *step.batch.values()]:
            self.counter.book(tensor, "parameters")
        self.settled = 0

    def statistics(self):
        top = max(self.counter.phase_peaks.get("all", 0), self.counter.total) + WORKSPACE
        return {
            "requested_bytes.all.peak": top - 8,
            "allocated_bytes.all.peak": top,
            "active_bytes.all.peak": top + SLACK,
            "reserved_bytes.all.peak": top + 2 * SLACK,
            "allocated_bytes.all.current": self.counter.total + WORKSPACE,
            "reserved_bytes.all.current": self.counter.total + WORKSPACE + 2 * SLACK,
            "num_alloc_retries": 3,
            "num_ooms": 0,
            "num_device_alloc": 7,
        }

    def reset_peaks(self):
        self.counter.phase = "all"
        self.counter.phase_peaks = {"all": self.counter.total}

    def settle(self):
        self.settled += 1


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "meft1"])
def test_the_allocators_peaks_per_phase_are_the_counted_ones(method):
    """On an allocator that holds the same storages, measured metrics equal the counted ones of the same cell."""
    step = a_step(method)
    allocator = CountingAllocator(step)
    with allocator.counter:
        measured = measure_memory(step, warmup=1, steps=2, allocator=allocator, read_device=None)
    counted = count_memory(a_step(method), warmup=1, steps=2)

    assert counted["activation_peak_bytes"].value == measured["activation_peak_bytes"].value
    assert counted["activation_gradients_bytes"].value == measured["activation_gradients_bytes"].value
    assert counted["peak_phase"].value == measured["peak_phase"].value
    assert counted["peak_allocated_bytes"].value + WORKSPACE == measured["peak_allocated_bytes"].value
    for phase in ("forward", "backward", "optimizer", "step"):
        expected = counted["peak_allocated_bytes"].phases[phase] + WORKSPACE
        assert expected == measured["peak_allocated_bytes"].phases[phase]
    assert allocator.settled >= 2


def test_the_ladder_and_the_breakdown():
    """requested <= allocated <= active <= reserved; categories with workspace and other sum to the peak."""
    step = a_step("lora")
    allocator = CountingAllocator(step)
    with allocator.counter:
        metrics = measure_memory(step, 1, 2, allocator, None)

    names = ("requested", "allocated", "active", "reserved")
    ladder = [metrics[f"peak_{name}_bytes"].value for name in names]
    assert sorted(ladder) == ladder
    assert WORKSPACE == metrics["workspace_bytes"].value
    breakdown = [metrics[f"{name}_bytes"].value for name in (*CATEGORIES, "workspace")]
    assert metrics["peak_allocated_bytes"].value == sum(breakdown)
    assert 3 == metrics["alloc_retries"].value
    assert "counted" == metrics["peak_buffers"].source
    assert "activations" in {row["category"] for row in metrics["peak_buffers"].value}
    assert {"measured"} == {metric.source for name, metric in metrics.items() if name != "peak_buffers"}


def test_without_nvml_what_lies_outside_torch_is_absent_with_the_reason():
    """Never a zero for unknown."""
    step = a_step("lora")
    allocator = CountingAllocator(step)
    with allocator.counter:
        metrics = measure_memory(step, 0, 1, allocator, None)

    assert metrics["process_device_bytes"].value is None
    assert "NVML" in metrics["context_bytes"].absent


# --- NVML ---


class NVMLError(Exception):
    pass


class FakeNvml:
    """The calls of pynvml that the probe makes; `processes` as (pid, bytes), `fails` raise."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, nvmlMemory_v2 = 1, 0, 2
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self, processes, fails=(), throttling=0):
        self.processes, self.fails, self.throttling = processes, fails, throttling

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert "GPU-1234" == uuid
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        self._maybe_fail("processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]

    def nvmlDeviceGetMemoryInfo(self, handle, version):
        assert 2 == version
        return SimpleNamespace(used=9_000)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        self._maybe_fail("clocks")
        return 1980

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 41

    def nvmlDeviceGetPowerUsage(self, handle):
        return 320_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.throttling

    def _maybe_fail(self, what):
        if what in self.fails:
            raise NVMLError("Insufficient Permissions")


def a_reading(*processes, **options):
    return nvml.DeviceReading(FakeNvml(processes, **options), "GPU-1234")


def test_a_process_alone_on_its_device():
    """Its bytes, the device's, and that nobody shares."""
    memory = a_reading((os.getpid(), 5_000)).memory()

    assert [5_000, 9_000, 0] == [
        memory[name].value for name in ("process_device_bytes", "device_used_bytes", "device_shared")
    ]


def test_a_shared_device_is_flagged():
    """Another process on the device makes device_shared 1."""
    assert 1 == a_reading((os.getpid(), 5_000), (1, 3)).memory()["device_shared"].value


@pytest.mark.parametrize(
    ("processes", "options", "reason"),
    [
        ([(1, 5_000)], {}, "does not list this process"),
        ([(os.getpid(), None)], {}, "does not tell memory per process"),
        ([(os.getpid(), 5_000)], {"fails": ["processes"]}, "Insufficient Permissions"),
    ],
)
def test_what_nvml_hides_is_absent_with_the_reason(processes, options, reason):
    """Containers, WDDM and MIG: None and why, and what is known all the same."""
    memory = a_reading(*processes, **options).memory()

    assert memory["process_device_bytes"].value is None
    assert reason in memory["process_device_bytes"].absent
    assert 9_000 == memory["device_used_bytes"].value


def test_conditions_of_a_timing():
    """Clocks, temperature, power, and the names of what holds the clocks down; a refused one is absent."""
    conditions = a_reading((os.getpid(), 1), throttling=4 | 64, fails=["clocks"]).conditions()

    assert ["power cap", "thermal, hardware"] == conditions["throttle_reasons"].value
    assert 320.5 == conditions["power_w"].value
    assert conditions["clocks_mhz"].absent == "NVML: Insufficient Permissions"


def test_the_context_is_the_process_minus_what_torch_holds():
    """context_bytes = process_device_bytes − reserved, after warm-up."""
    step = a_step("lora")
    allocator = CountingAllocator(step)
    with allocator.counter:
        metrics = measure_memory(step, 1, 1, allocator, a_reading((os.getpid(), 10**9)))

    reserved = allocator.statistics()["reserved_bytes.all.current"]
    assert 10**9 - reserved == metrics["context_bytes"].value


def test_torchs_statistics_have_the_names_the_probe_reads():
    """The keys asked for are among those torch's own code documents for memory_stats."""
    import torch

    documented = torch.cuda.memory_stats.__doc__
    for key in [*memory_cuda.PEAKS.values(), memory_cuda.ALLOCATED, memory_cuda.RESERVED]:
        name, pool, statistic = key.split(".")
        assert name in documented, key
        assert pool == "all"
        assert statistic in ("peak", "current")
