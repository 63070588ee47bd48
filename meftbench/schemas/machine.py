"""What is published of a machine and of the catalogue: the answers of `doctor` and `list`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, RootModel

from meftbench.catalogue.profiles import CpuProfile, Profile
from meftbench.schemas.base import Bytes, Published


class Host(Published):
    """The machine."""

    name: str
    system: str
    kernel: str
    machine: str
    python: str
    cpu: str
    bf16_products: bool | None
    """Whether the processor has instructions for bf16; null: not known."""
    cores: int
    memory_bytes: Bytes
    cgroup_memory_limit_bytes: Bytes | None
    container: bool
    available_bytes: Bytes
    """What a cell may take."""


class Devices(Published):
    """GPUs in the driver's order; where there are none, `absent` says why."""

    devices: list[dict[str, Any]]
    driver: str | None
    absent: str | None


class DoctorAnswer(Published):
    """`meftbench doctor --json`."""

    measures: dict[str, str]
    """`yes`, or why not, for `counted` and `cuda`."""
    packages: dict[str, str | None]
    """Versions; null: not installed."""
    host: Host
    gpus: Devices
    torch: dict[str, Any]


class CalibrateAnswer(RootModel[Profile | CpuProfile]):
    """`meftbench doctor --calibrate --json`: the profile that was written, of a GPU or of a CPU."""


class Listed(Published):
    """A name of the catalogue. Metrics, models, profiles, methods and tasks have more fields."""

    summary: str
    settings: dict[str, Any] = Field(default_factory=dict)
    """Defaults of the settings of a method or lever."""


class ListAnswer(RootModel[dict[str, Listed]]):
    """`meftbench list KIND --json`: what has a name, by name."""
