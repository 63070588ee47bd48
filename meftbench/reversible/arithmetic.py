"""How the numbers of the streams are represented between blocks.

A stream is (B, L, D): samples, positions, hidden size. The coupling equations (coupling.py) use only the operations
below, so that each representation is one class here. Operations whose name ends in `_` work in place on a tile (T, D)
of a stream: T tokens, whichever samples they belong to.

    Float          floating point, as published: dividing by a factor amplifies rounding errors
    FixedPoint     integers of 32 or 64 bits: reversal is exact (docs/design.md 3)
    StraightThrough   FixedPoint's values in float64, differentiable: for reference autograd through the same equations
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from meftbench.reversible import bits, fused
from meftbench.reversible.weights import Weights, weighted


class ReferenceArithmetic(Protocol):
    """The operations for reference autograd (the same equations under torch's autograd, nothing recomputed): all are
    differentiable, and none works in place."""

    def lifted(self, h_BLD: Tensor) -> Tensor:
        """The stream that represents a hidden state (floating point)."""
        ...

    def read(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of a stream in floating point."""
        ...

    def shrunk(self, x_BLD: Tensor, factor: float) -> Tensor:
        """factor · x, for a factor of at least 0."""
        ...

    def added(self, x_BLD: Tensor, value_BLD: Tensor, weight: Tensor | float | None = None) -> Tensor:
        """x + weight · value: the sum of a stream and a floating-point value, as a stream.  weight: None: 1."""
        ...


class Arithmetic(Protocol):
    """The operations of a reversible stack's forward and backward pass.

    factor: at least 0; there is no way back from 0.  weight: of a value, one for all tokens or (T, 1); None: 1.
    exact: whether `grow_` undoes `shrink_`, and `subtract_` undoes `add_`, bit for bit.
    limit: streams hold integers |x| < limit; None: only the range of floating point limits them.
    reference: the same operations for reference autograd.
    """

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def limit(self) -> float | None: ...
    @property
    def reference(self) -> ReferenceArithmetic: ...

    def lift(self, h_BLD: Tensor, watch: Tensor | None = None) -> Tensor:
        """A new, contiguous stream from a hidden state (floating point). watch: as in `add_`, for the stream itself."""
        ...

    def read(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of a stream in floating point; may be the stream itself."""
        ...

    def unit(self, device: torch.device) -> float | Tensor:
        """The value that 1 in a stream stands for: one for all channels, or (D,), float32."""
        ...

    def side_bytes(self, columns: int, factor: float) -> int:
        """Bytes of side information per row that `shrink_` by `factor` returns."""
        ...

    def shrink_(self, x_TD: Tensor, factor: float, keep: bool = True) -> Tensor | None:
        """x becomes factor · x. Returns what `grow_` needs to undo it; None if that is nothing, or `keep` is False."""
        ...

    def grow_(self, x_TD: Tensor, factor: float, side: Tensor | None) -> None:
        """The inverse of `shrink_`."""
        ...

    def add_(
        self, x_TD: Tensor, value_TD: Tensor, watch: Tensor | None = None, weight: Tensor | float | None = None
    ) -> None:
        """x becomes x + weight · value. With a `limit`, `watch` (no dimensions) is raised to the largest resulting |x|,
        in units of the stream, if it is below that."""
        ...

    def subtract_(self, x_TD: Tensor, value_TD: Tensor, weight: Tensor | float | None = None) -> None:
        """The inverse of `add_`."""
        ...

    def couple_(
        self, x_TD: Tensor, o_TD: Tensor, value_TD: Tensor, weights: Weights, keep: bool, watch: Tensor | None
    ) -> Tensor | None:
        """x becomes y by the equation of `weights`, by the operations above or by one kernel with the same result.
        Returns what `uncouple_` needs to undo it; None if that is nothing, or `keep` is False."""
        ...

    def uncouple_(self, y_TD: Tensor, o_TD: Tensor, value_TD: Tensor, weights: Weights, side: Tensor | None) -> None:
        """The inverse of `couple_`."""
        ...


class _StepByStep:
    """`couple_` and `uncouple_`, composed of the other operations of an arithmetic."""

    def couple_(
        self: Arithmetic,
        x_TD: Tensor,
        o_TD: Tensor,
        value_TD: Tensor,
        weights: Weights,
        keep: bool,
        watch: Tensor | None,
    ) -> Tensor | None:
        if weights.centre:
            x_TD.sub_(o_TD, alpha=weights.centre)
        side = self.shrink_(x_TD, weights.factor, keep)
        if weights.sign is not None:
            x_TD.mul_(weights.sign)
        self.add_(x_TD, value_TD, watch, weights.value)
        return side

    def uncouple_(
        self: Arithmetic,
        y_TD: Tensor,
        o_TD: Tensor,
        value_TD: Tensor,
        weights: Weights,
        side: Tensor | None,
    ) -> None:
        self.subtract_(y_TD, value_TD, weights.value)
        if weights.sign is not None:
            y_TD.mul_(weights.sign)
        self.grow_(y_TD, weights.factor, side)
        if weights.centre:
            y_TD.add_(o_TD, alpha=weights.centre)


@dataclass(frozen=True)
class Float(_StepByStep):
    """Streams are floating point, as in the paper: no side information is kept, and dividing by a factor f
    multiplies rounding errors by 1/f in every block (docs/design.md 3)."""

    name = "float"
    exact = False
    limit = None

    @property
    def reference(self) -> ReferenceArithmetic:
        return self

    def lift(self, h_BLD: Tensor, watch: Tensor | None = None) -> Tensor:
        return h_BLD.clone(memory_format=torch.contiguous_format)

    def lifted(self, h_BLD: Tensor) -> Tensor:
        return h_BLD

    def read(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        return x_TD.to(dtype)

    def unit(self, device: torch.device) -> float:
        return 1.0

    def shrunk(self, x_BLD: Tensor, factor: float) -> Tensor:
        return x_BLD if factor == 1.0 else x_BLD * factor

    def added(self, x_BLD: Tensor, value_BLD: Tensor, weight: Tensor | float | None = None) -> Tensor:
        # Under autocast, the value of a sublayer may have lower precision than the stream.
        return x_BLD + weighted(value_BLD.to(x_BLD.dtype), weight)

    def side_bytes(self, columns: int, factor: float) -> int:
        return 0

    def shrink_(self, x_TD: Tensor, factor: float, keep: bool = True) -> None:
        if factor != 1.0:
            x_TD.mul_(factor)

    def grow_(self, x_TD: Tensor, factor: float, side: Tensor | None) -> None:
        if factor != 1.0:
            x_TD.div_(factor)

    def add_(
        self, x_TD: Tensor, value_TD: Tensor, watch: Tensor | None = None, weight: Tensor | float | None = None
    ) -> None:
        x_TD.add_(weighted(value_TD.to(x_TD.dtype), weight))

    def subtract_(self, x_TD: Tensor, value_TD: Tensor, weight: Tensor | float | None = None) -> None:
        x_TD.sub_(weighted(value_TD.to(x_TD.dtype), weight))


class ChannelSteps:
    """A fixed-point step 2⁻ᵏ for each channel: k (D,), integers of any sign, on the CPU.

    The vectors 2ᵏ and 2⁻ᵏ that streams are multiplied by are made once per device. Two ChannelSteps are equal only if
    they are the same object, so that kinds of arithmetic with different ChannelSteps are unequal too.
    """

    def __init__(self, bits_D: Tensor) -> None:
        self._bits: list[int] = bits_D.tolist()
        self._powers: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def bits_D(self) -> Tensor:  # noqa: N802  # ends in the shape suffix of a tensor
        """k (D,), int16."""
        return torch.tensor(self._bits, dtype=torch.int16)

    def powers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(2ᵏ, 2⁻ᵏ), each (D,), float32, on `device`."""
        if device not in self._powers:
            # Made by numpy, so that constants of the model do not count as allocations of whichever step is the first.
            arrays = (np.ldexp(np.float32(1), np.array(self._bits) * sign) for sign in (1, -1))
            up, down = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
            self._powers[device] = up.to(device), down.to(device)
        return self._powers[device]


@dataclass(frozen=True)
class FixedPoint(_StepByStep):
    """Streams are integers in steps of 2⁻ᵏ: int32 holds values from −2³¹⁻ᵏ up to 2³¹⁻ᵏ.

    step_bits: k, one for all channels or one per channel, since one channel of a language model may hold values
        thousands of times those of another (docs/design.md 3). Shifts and side bits do not depend on k.
    wide: int64 instead of int32, of which values below 2⁵² are used: float64 still represents them exactly. Steps may
        then be so fine that nothing is lost of a float32.
    lift, add: a floating-point value is rounded to the step; the gradient passes straight through the rounding.
    shrink by 2⁻ᵐ, m = 0 .. 8: x >> m, which rounds down; the m low bits of x are put aside, packed (bits.py). By 0: x
        becomes zero, which nothing undoes.
    All operations act on integers that recomputation reproduces, so the inverse is exact at any depth.
    Raises ValueError: a factor is not 2⁻ᵐ, m = 0 .. 8.
    """

    step_bits: int | ChannelSteps = 16
    wide: bool = False
    name = "exact"
    exact = True

    @property
    def limit(self) -> float:
        return 2.0**52 if self.wide else 2.0**31

    @property
    def reference(self) -> ReferenceArithmetic:
        return StraightThrough(self)

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.wide else torch.int32

    def scale(self, device: torch.device) -> float | Tensor:
        """2ᵏ: one for all channels, or (D,), float32."""
        if isinstance(self.step_bits, ChannelSteps):
            return self.step_bits.powers(device)[0]
        return math.ldexp(1.0, self.step_bits)

    def unit(self, device: torch.device) -> float | Tensor:
        if isinstance(self.step_bits, ChannelSteps):
            return self.step_bits.powers(device)[1]
        return math.ldexp(1.0, -self.step_bits)

    def lift(self, h_BLD: Tensor, watch: Tensor | None = None) -> Tensor:
        scaled_BLD = self.scaled(h_BLD)
        _raise_to(watch, scaled_BLD)
        return scaled_BLD.round_().to(self.dtype).contiguous()

    def read(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        return x_TD.to(_wide(dtype)).mul_(self.unit(x_TD.device)).to(dtype)

    def side_bytes(self, columns: int, factor: float) -> int:
        m = side_bits(factor)
        return bits.row_bytes(columns, m) if m else 0

    def shrink_(self, x_TD: Tensor, factor: float, keep: bool = True) -> Tensor | None:
        if factor == 0.0:
            x_TD.zero_()
            return None
        m = side_bits(factor)
        if m == 0:
            return None
        # The conversion to uint8 keeps the lowest eight bits of an integer, of a negative one too.
        side = bits.pack(x_TD.to(torch.uint8).bitwise_and_((1 << m) - 1), m) if keep else None
        x_TD.bitwise_right_shift_(m)
        return side

    def grow_(self, x_TD: Tensor, factor: float, side: Tensor | None) -> None:
        m = side_bits(factor)
        if m == 0:
            return
        assert side is not None
        x_TD.bitwise_left_shift_(m).bitwise_or_(bits.unpack(side, m, x_TD.shape[-1]))

    def add_(
        self, x_TD: Tensor, value_TD: Tensor, watch: Tensor | None = None, weight: Tensor | float | None = None
    ) -> None:
        scaled_TD = self.scaled(value_TD, weight).round_()
        steps_TD = scaled_TD.to(self.dtype)
        if watch is not None:
            # The sum is taken once more in floating point, which does not wrap around at the end of the range.
            _raise_to(watch, scaled_TD.add_(x_TD))
        x_TD.add_(steps_TD)

    def subtract_(self, x_TD: Tensor, value_TD: Tensor, weight: Tensor | float | None = None) -> None:
        x_TD.sub_(self.scaled(value_TD, weight).round_().to(self.dtype))

    def couple_(
        self, x_TD: Tensor, o_TD: Tensor, value_TD: Tensor, weights: Weights, keep: bool, watch: Tensor | None
    ) -> Tensor | None:
        if not (weights.fusable and fused.usable(x_TD, value_TD)):
            return super().couple_(x_TD, o_TD, value_TD, weights, keep, watch)
        width = self.side_bytes(x_TD.shape[-1], weights.factor)
        side = x_TD.new_empty(x_TD.shape[0], width, dtype=torch.uint8) if keep and width else None
        m, scale = side_bits(weights.factor), self.scale(x_TD.device)
        fused.forward_(x_TD, o_TD if weights.centre else None, value_TD, side, m=m, scale=scale, watch=watch)
        return side

    def uncouple_(self, y_TD: Tensor, o_TD: Tensor, value_TD: Tensor, weights: Weights, side: Tensor | None) -> None:
        if not (weights.fusable and fused.usable(y_TD, value_TD)):
            super().uncouple_(y_TD, o_TD, value_TD, weights, side)
            return
        m, scale = side_bits(weights.factor), self.scale(y_TD.device)
        fused.inverse_(y_TD, o_TD if weights.centre else None, value_TD, side, m=m, scale=scale)

    def scaled(self, value: Tensor, weight: Tensor | float | None = None) -> Tensor:
        """weight · value / step, a new tensor, in float32 (float64 where the value is)."""
        scaled = value.detach().to(_wide(value.dtype)) * self.scale(value.device)
        return scaled if weight is None else scaled.mul_(weight)


@dataclass(frozen=True)
class StraightThrough:
    """FixedPoint for reference autograd: multiples of the step in float64, which represents them all exactly. The
    values are those of FixedPoint, computed by differentiable operations; rounding passes gradients on unchanged."""

    fixed: FixedPoint

    def lifted(self, h_BLD: Tensor) -> Tensor:
        return self._rounded(h_BLD)

    def read(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        return x_BLD if dtype == torch.float64 else x_BLD.to(torch.float32).to(dtype)

    def shrunk(self, x_BLD: Tensor, factor: float) -> Tensor:
        if factor == 0.0:
            return torch.zeros_like(x_BLD)
        if side_bits(factor) == 0:
            return x_BLD
        product_BLD, unit = x_BLD * factor, self.fixed.unit(x_BLD.device)
        exact_BLD = (product_BLD.detach() / unit).floor_().mul_(unit)
        return _PassThrough.apply(product_BLD, exact_BLD)  # type: ignore[no-untyped-call, no-any-return]

    def added(self, x_BLD: Tensor, value_BLD: Tensor, weight: Tensor | float | None = None) -> Tensor:
        return x_BLD + self._rounded(value_BLD, weight)

    def _rounded(self, value: Tensor, weight: Tensor | float | None = None) -> Tensor:
        rounded = self.fixed.scaled(value, weight).round_().double().mul_(self.fixed.unit(value.device))
        return _PassThrough.apply(weighted(value, weight), rounded)  # type: ignore[no-untyped-call, no-any-return]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which values of `dtype` are scaled to steps and back."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _PassThrough(torch.autograd.Function):
    """Gives the second argument, and passes its gradient on to the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = value.dtype
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def side_bits(factor: float) -> int:
    """m, 0 to 8, of a factor 2⁻ᵐ. Raises ValueError: the factor is no such power of two."""
    mantissa, exponent = math.frexp(factor)
    m = 1 - exponent
    if mantissa != 0.5 or not 0 <= m <= bits.MAX_BITS:
        raise ValueError(f"factor {factor} is not 1, 1/2, 1/4 ... 1/{2**bits.MAX_BITS}, which exact reversal needs")
    return m


def _raise_to(watch: Tensor | None, value: Tensor) -> None:
    """watch becomes the maximum of watch and all |value|, on the device; a NaN makes it NaN."""
    if watch is not None:
        low, high = torch.aminmax(value)
        torch.maximum(watch, torch.maximum(-low, high).to(watch.dtype), out=watch)
