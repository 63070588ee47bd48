"""Devices by name, to predict memory and time on one that is not present. Those of the package are GPUs; the file of a
CPU is what `meftbench doctor --calibrate` writes on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from meftbench.catalogue.speeds import Speeds
from meftbench.errors import UserError, unknown
from meftbench.strict_yaml import read, validated
from meftbench.units import parse_bytes

# What comes before the name of a profile where a cell says its device: predicted for it, or measured on such a card.
PREDICTED, CARD = "predicted:", "cuda:"
_FOLDER = Path(__file__).with_suffix("")


def _bytes(value: Any) -> Any:
    return value if isinstance(value, bool | float) else parse_bytes(value)


def _capability(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError(f'is a number: write it in quotes, "{float(value)}"')
    return value


_MOST = 2**50  # bytes: no device has a PiB
Bytes = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=0, le=_MOST)]
Room = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=1, le=_MOST)]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Device = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]{1,200}$")]


class OwnCells(BaseModel):
    """What `reports/campaigns/device_profile.py` found when it measured cells on the device and predicted them.

    cells: how many.  median, worst: errors of peak allocated memory, as shares without signs.  torch: its version.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    cells: int = Field(ge=1, le=10**6)
    median: float = Field(ge=0, allow_inf_nan=False)
    worst: float = Field(ge=0, allow_inf_nan=False)
    torch: str = Field(pattern=r"^[0-9][0-9A-Za-z.+_-]*$")

    @model_validator(mode="after")
    def _median_is_no_worse(self) -> OwnCells:
        if self.median > self.worst:
            raise ValueError("has a median error above the worst: write them the other way round")
        return self


class Profile(BaseModel):
    """What memory prediction needs to know of a device. In the file, bytes may be written as 81559MiB.

    device: the product's name, as the driver and torch give it.
    memory_bytes: all of it, as the driver shows it.  usable_bytes: the part that torch reports (`total_memory`; the
    driver keeps the rest); None: not known.
    compute_capability: such as "8.9"; decides which kernels run.  multiprocessors: their number; decides into how many
    pieces passes are divided.
    context_bytes: what a torch process takes before its first tensor. Always an estimate, as it depends on the kernels
    that are loaded and on the driver.
    cublas_workspace_bytes: torch's default without CUBLAS_WORKSPACE_CONFIG, taken from torch's allocator, for each
    thread that multiplies matrices (the backward pass has its own thread) on each stream.
    cublaslt_workspace_bytes: the same for cuBLASLt; 0 where it shares cuBLAS's, torch's default on CUDA.
    verified: whether a run of this program on the device agreed.  validated: with how many cells, and how well.
    speeds: what step times are predicted from; None: they cannot be.
    sources: where each number is from.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    name: Name
    device: Device
    memory_bytes: Room
    usable_bytes: Room | None = None
    compute_capability: Annotated[str, BeforeValidator(_capability), Field(pattern=r"^[1-9][0-9]?\.[0-9]$")]
    multiprocessors: int = Field(ge=1, le=10_000)
    context_bytes: Bytes
    cublas_workspace_bytes: Bytes
    cublaslt_workspace_bytes: Bytes
    verified: bool
    validated: OwnCells | None = None
    speeds: Speeds | None = None
    sources: list[str] = Field(min_length=1)


class CpuProfile(BaseModel):
    """A machine whose CPU trains: what `meftbench doctor --calibrate` writes on one.

    kind: tells it from the profile of a GPU.  device: the processor's name.  memory_bytes: of the machine.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["cpu"]
    name: Name
    device: Device
    memory_bytes: Room
    speeds: Speeds


class _Shipped(Mapping[str, Profile]):
    """The profiles in the package by name; a file is read when it is first used."""

    def __getitem__(self, name: str) -> Profile:
        if name not in set(self):
            raise KeyError(name)
        return _read(_FOLDER / f"{name}.yaml")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(file.stem for file in _FOLDER.glob("*.yaml")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


PROFILES: Mapping[str, Profile] = _Shipped()


def find_device(name: str, where: str = "") -> Profile | CpuProfile:
    """The profile in the package that is called `name`, or that of the YAML file at the path `name`.

    Raises UserError: when there is no such profile (at `where`, with the nearest name), or the file has a fault.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in name:
        document = read(path)
        of_cpu = isinstance(document.content, dict) and "kind" in document.content
        return validated(document, CpuProfile) if of_cpu else validated(document, Profile)
    if name not in PROFILES:
        raise unknown(where, "profile", name, PROFILES)
    return PROFILES[name]


def find_profile(name: str, where: str = "") -> Profile:
    """The same of a GPU. Raises UserError also where the file is that of a CPU."""
    profile = find_device(name, where)
    if isinstance(profile, CpuProfile):
        what = f"is the profile of a CPU ({profile.device}), which `meftbench estimate` alone takes"
        raise UserError(name, what, "name the profile of a GPU: meftbench list profiles")
    return profile


@cache
def _read(file: Path) -> Profile:
    return validated(read(file), Profile)
