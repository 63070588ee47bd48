"""How cells are measured. Every record has the protocol's hash, since records of two protocols are not comparable."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meftbench.catalogue.probes import PROBES
from meftbench.plan.identity import digest
from meftbench.strict_yaml import FaultAtError
from meftbench.units import parse_bytes, parse_duration

MOST_STEPS = 10**6  # of a pass
LONGEST_S = 366 * 24 * 3600  # that a cell may take
USUAL = tuple(name for name, entry in PROBES.items() if entry.usual)


def _known_passes(value: Any) -> Any:
    for index, name in enumerate(value if isinstance(value, (list, tuple)) else []):
        if not isinstance(name, str) or name not in PROBES:
            raise FaultAtError(f"unknown pass {name!r}, one of: {', '.join(PROBES)}", index)
    return tuple(value) if isinstance(value, list) else value


def _split_size(value: Any) -> Any:
    if isinstance(value, dict) and set(value) != {"max_split_size_mb"}:
        unknown_keys = [key for key in value if key != "max_split_size_mb"]
        raise FaultAtError("write `default`, `expandable` or `{max_split_size_mb: N}`", *unknown_keys[:1])
    return value


def _bytes(value: Any) -> Any:
    return None if value is None else parse_bytes(value)


class Protocol(BaseModel):
    """How a cell is measured (docs/design.md 6).

    warmup: steps before the measured ones; when memory is measured, at least 1 if the optimizer keeps state.
    steps: measured steps of each pass; a peak is the largest over them.
    repeats: how often a cell is measured, each time in a fresh process; None: 3 times on CUDA, else once.
    timeout: seconds that a cell may take before its processes are killed.
    passes: names of the probes that are run.
    allocator: the setting of torch's CUDA caching allocator, put into the worker's environment.
    on_oom: what follows a cell that is out of memory. `record`: nothing; `skip-larger`: cells that need at least as
        much are skipped; `bracket`: as skip-larger, and the largest batch size that fits is found by bisection.
    exclusive: whether a GPU on which another process computes is refused.
    padding: share of each sequence that is padding, from 0 to below 1.
    threads: CPU threads of a worker; None: OMP_NUM_THREADS, or else the cores divided by the jobs.
    memory_limit: bytes of device memory that a cell may hold before it ends as `oom`; None: what the device has.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    warmup: int = Field(default=2, ge=0, le=MOST_STEPS)
    steps: int = Field(default=5, ge=1, le=MOST_STEPS)
    repeats: int | None = Field(default=None, ge=1, le=1000)
    timeout: Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=float | str)] = Field(
        default=600.0, gt=0, le=LONGEST_S
    )
    passes: Annotated[tuple[str, ...], BeforeValidator(_known_passes)] = Field(default=USUAL, min_length=1)
    allocator: Annotated[Literal["default", "expandable"] | dict[str, int], BeforeValidator(_split_size)] = "default"
    on_oom: Literal["record", "bracket", "skip-larger"] = "bracket"
    exclusive: bool = True
    padding: float = Field(default=0.0, ge=0, lt=1)
    threads: int | None = Field(default=None, ge=1, le=10_000)
    memory_limit: Annotated[int | None, BeforeValidator(_bytes, json_schema_input_type=int | str | None)] = None

    @property
    def protocol_id(self) -> str:
        """Hash of everything that affects what is measured; timeout, repeats and on_oom do not."""
        return digest(self.model_dump(mode="json", exclude={"timeout", "repeats", "on_oom"}))

    @property
    def alloc_conf(self) -> str:
        """The allocator's setting in the form of PYTORCH_ALLOC_CONF; "" is torch's default."""
        if self.allocator == "expandable":
            return "expandable_segments:True"
        settings = self.allocator.items() if isinstance(self.allocator, dict) else ()
        return ",".join(f"{key}:{value}" for key, value in settings)

    def repeats_on(self, device: str) -> int:
        """How many fresh processes measure a cell on `device`."""
        return self.repeats if self.repeats is not None else (3 if device.startswith("cuda") else 1)
