"""How cells are measured, hashed into every record: records of two protocols are not comparable."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meftbench.catalogue.probes import PROBES
from meftbench.plan.identity import digest
from meftbench.strict_yaml import FaultAtError
from meftbench.units import parse_bytes, parse_duration

USUAL = tuple(name for name, entry in PROBES.items() if entry.usual)


def _known_passes(value: Any) -> Any:
    for index, name in enumerate(value if isinstance(value, (list, tuple)) else []):
        if not isinstance(name, str) or name not in PROBES:
            raise FaultAtError(f"unknown pass {name!r}, one of: {', '.join(PROBES)}", index)
    return tuple(value) if isinstance(value, list) else value


def _split_size(value: Any) -> Any:
    if isinstance(value, dict) and set(value) != {"max_split_size_mb"}:
        wrong = [key for key in value if key != "max_split_size_mb"]
        raise FaultAtError("write `default`, `expandable` or `{max_split_size_mb: N}`", *wrong[:1])
    return value


def _bytes(value: Any) -> Any:
    return None if value is None else parse_bytes(value)


class Protocol(BaseModel):
    """How a cell is measured (docs/design.md 6).

    warmup: steps before the measured ones; at least 1 is taken where the optimizer has state.
    steps: measured steps of each pass; a peak is the largest over them.
    repeats: fresh processes a cell; None: 3 on CUDA, 1 where bytes are counted.
    timeout: seconds a cell may take before its process group is killed.
    allocator: the CUDA caching allocator's setting, put into the worker's environment.
    on_oom: `record` it and go on; `skip-larger`: cells that need more are not started;
        `bracket`: as skip-larger, and cells between a fitting and a failing batch are tried from the middle.
    padding: share of each sequence that is padding, 0 to below 1.
    threads: CPU threads of a worker; None: OMP_NUM_THREADS or else the cores, divided by the jobs.
    memory_limit: bytes of device memory a cell may hold before it ends as `oom`; None: what the device has.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    warmup: int = Field(default=2, ge=0)
    steps: int = Field(default=5, ge=1)
    repeats: int | None = Field(default=None, ge=1)
    timeout: Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=float | str)] = Field(
        default=600.0, gt=0
    )
    passes: Annotated[tuple[str, ...], BeforeValidator(_known_passes)] = Field(default=USUAL, min_length=1)
    allocator: Annotated[Literal["default", "expandable"] | dict[str, int], BeforeValidator(_split_size)] = "default"
    on_oom: Literal["record", "bracket", "skip-larger"] = "bracket"
    exclusive: bool = True
    padding: float = Field(default=0.0, ge=0, lt=1)
    threads: int | None = Field(default=None, ge=1)
    memory_limit: Annotated[int | None, BeforeValidator(_bytes, json_schema_input_type=int | str | None)] = None

    @property
    def protocol_id(self) -> str:
        """Hash of everything that changes what is measured; the time allowed and the repeats do not."""
        return digest(self.model_dump(mode="json", exclude={"timeout", "repeats", "on_oom"}))

    @property
    def alloc_conf(self) -> str:
        """The allocator's setting as PYTORCH_ALLOC_CONF has it; "" is torch's default."""
        if self.allocator == "expandable":
            return "expandable_segments:True"
        given = self.allocator.items() if isinstance(self.allocator, dict) else ()
        return ",".join(f"{key}:{value}" for key, value in given)

    def repeats_on(self, device: str) -> int:
        """Fresh processes for a cell on `device`."""
        return self.repeats if self.repeats is not None else (3 if device == "cuda" else 1)
