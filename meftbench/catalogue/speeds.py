"""How fast a device is: what step times are predicted from (prediction/seconds.py), as part of a profile."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, le=1e20)]
Share = Annotated[float, Field(gt=0, le=1)]


Curve = Annotated[list[Annotated[list[Positive], Field(min_length=2, max_length=2)]], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Rate(_Part):
    """Operations a second, by the dimensions of what is computed.

    rate: flop/s of the largest products.  half: for each dimension the size at which that alone halves the rate; 0: it
    has no influence. The rate at sizes d is  rate · ∏ d / (d + half).
    loading_bytes_per_s: of a product's factors and result, where a processor waits for them beside computing; None: it
        computes meanwhile, and the longer of both counts.
    """

    rate: Positive
    loading_bytes_per_s: Positive | None = None
    half: list[Annotated[float, Field(ge=0, allow_inf_nan=False, le=1e9)]] = []

    def at(self, size: tuple[int, ...]) -> float:
        """flop/s at these dimensions, of which those beyond `half` have no influence."""
        share = math.prod(d / (d + h) for d, h in zip(size, self.half, strict=False) if d > 0)
        return self.rate * share


class TimesFound(_Part):
    """How far off predicted step times were: errors without signs, as shares.

    cells: how many were measured.  of: what was compared, such as "step time" or "step time over that of
    lora+checkpoint".
    """

    cells: int = Field(ge=1, le=10**6)
    median: float = Field(ge=0, allow_inf_nan=False)
    worst: float = Field(ge=0, allow_inf_nan=False)
    of: str = Field(min_length=1, max_length=200)


class Speeds(_Part):
    """What a device does in a second.

    calibrated: whether `meftbench doctor --calibrate` measured them on the device; else they are a data sheet's.
    threads: of the CPU that was measured; None: of a GPU.
    matrix: of products of matrices by dtype; sizes are rows, inner dimension, columns.
    attention, attention_backward: of fused attention by dtype; sizes are positions of queries and of keys, and of a
        head. A dtype that is not there has the rate of `matrix`.
    memory: for each kind of operator (catalogue/operations.py) that only moves bytes, pairs of the bytes that it writes
        and of the bytes a second that it reads and writes then, sizes ascending; between them it is interpolated. A
        kind that is not there has that of "elementwise".
    fresh_bytes_per_s: of memory that is touched for the first time on a CPU, whose kernel clears it; None: it takes no
        time, as on a GPU, where torch keeps its memory.
    launch_s: seconds to start a kernel: what an operator costs the host, whatever its size.
    asynchronous: whether kernels are started while others run, so that the slower of both counts, not the sum.
    link_bytes_per_s: of copies between the device and host memory, in one direction; None: there is no such link.
    host_bytes_per_s: of operators on the host; None: as the device.
    matrix_efficiency, memory_efficiency: the shares of the rates above that real kernels reach.
    sources: where each number is from.  validated: how far off step times were that were predicted from them.
    """

    calibrated: bool
    threads: int | None = Field(default=None, ge=1, le=10_000)
    matrix: dict[str, Rate] = Field(min_length=1)
    attention: dict[str, Rate] = {}
    attention_backward: dict[str, Rate] = {}
    memory: dict[str, Curve]
    launch_s: float = Field(ge=0, le=1)
    asynchronous: bool
    fresh_bytes_per_s: Positive | None = None
    link_bytes_per_s: Positive | None = None
    host_bytes_per_s: Positive | None = None
    matrix_efficiency: Share = 1.0
    memory_efficiency: Share = 1.0
    sources: list[str] = Field(min_length=1)
    validated: TimesFound | None = None

    @model_validator(mode="after")
    def _curves_ascend(self) -> Speeds:
        if "elementwise" not in self.memory:
            raise ValueError("has no memory rate for elementwise: write `memory: {elementwise: [[1, BYTES_A_SECOND]]}`")
        for kind, curve in self.memory.items():
            sizes = [size for size, _ in curve]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"has sizes of {kind} that do not ascend: order its pairs by their first number")
        return self

    def bandwidth(self, kind: str, written: float) -> float:
        """Bytes a second that operators of a kind read and write which write so many bytes.

        Between two sizes of the curve, the time for a byte is interpolated over the logarithm of the size; beyond its
        ends it stays that of the end.
        """
        curve = self.memory.get(kind) or self.memory["elementwise"]
        number = bisect_right(curve, written, key=_size)
        if number in (0, len(curve)):
            rate = curve[min(number, len(curve) - 1)][1]
        else:
            (low, slow), (high, fast) = curve[number - 1 : number + 1]
            share = math.log(written / low) / math.log(high / low)
            rate = 1 / ((1 - share) / slow + share / fast)
        return rate * self.memory_efficiency


def _size(pair: list[float]) -> float:
    return pair[0]
