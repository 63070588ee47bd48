"""How the streams are held between blocks.

A stream is (B, L, D): samples, positions, hidden size. The equations (coupling.py) are written in the operations
below, so another way to hold numbers is another class here and nothing else. Operations whose name ends in `_` work
in place on a tile (T, D) of a stream: T tokens, wherever they stand.

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


class ReferenceArithmetic(Protocol):
    """The operations under reference autograd: nothing in place, every one differentiable."""

    def lifted(self, h_BLD: Tensor) -> Tensor:
        """A stream from a hidden state (floating point)."""
        ...

    def read(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of a stream in floating point."""
        ...

    def shrunk(self, x_BLD: Tensor, factor: float) -> Tensor:
        """factor · x."""
        ...

    def added(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        """x + value: a stream and a floating-point value."""
        ...


class Arithmetic(Protocol):
    """The operations of the reversible passes, each exact or not as the implementation says.

    exact: `grow_` undoes `shrink_`, and `subtract_` undoes `add_`, bit for bit.
    limit: streams hold integers |x| < limit; None: what floating point holds.
    reference: the same numbers for reference autograd.
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
        """A contiguous stream of its own from a hidden state (floating point)."""
        ...

    def read(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of a stream in floating point; may be the stream itself."""
        ...

    def unit(self, device: torch.device) -> float | Tensor:
        """The value of 1 in a stream: one for all channels, or (D,), float32."""
        ...

    def side_bytes(self, columns: int, factor: float) -> int:
        """Bytes a row that `shrink_` by `factor` puts aside."""
        ...

    def shrink_(self, x_TD: Tensor, factor: float, keep: bool = True) -> Tensor | None:
        """x becomes factor · x; what `grow_` needs to undo it (None: nothing, or `keep` is off)."""
        ...

    def grow_(self, x_TD: Tensor, factor: float, side: Tensor | None) -> None:
        """The inverse of `shrink_`."""
        ...

    def add_(self, x_TD: Tensor, value_TD: Tensor, watch: Tensor | None = None) -> None:
        """x becomes x + value; `watch` (no dimensions) is raised to the largest |x| that came about, in units."""
        ...

    def subtract_(self, x_TD: Tensor, value_TD: Tensor) -> None:
        """The inverse of `add_`."""
        ...

    def couple_(
        self, x_TD: Tensor, centre_TD: Tensor | None, value_TD: Tensor, factor: float, keep: bool, watch: Tensor | None
    ) -> Tensor | None:
        """x becomes factor · (x − centre) + value, by the operations above or by one kernel that equals them; what
        `uncouple_` needs to undo it (None: nothing, or `keep` is off).  centre: None is zero."""
        ...

    def uncouple_(
        self, y_TD: Tensor, centre_TD: Tensor | None, value_TD: Tensor, factor: float, side: Tensor | None
    ) -> None:
        """The inverse of `couple_`."""
        ...


class _StepByStep:
    """`couple_` and `uncouple_` by the other operations of an arithmetic."""

    def couple_(
        self: Arithmetic,
        x_TD: Tensor,
        centre_TD: Tensor | None,
        value_TD: Tensor,
        factor: float,
        keep: bool,
        watch: Tensor | None,
    ) -> Tensor | None:
        if centre_TD is not None:
            x_TD.sub_(centre_TD)
        side = self.shrink_(x_TD, factor, keep)
        self.add_(x_TD, value_TD, watch)
        return side

    def uncouple_(
        self: Arithmetic,
        y_TD: Tensor,
        centre_TD: Tensor | None,
        value_TD: Tensor,
        factor: float,
        side: Tensor | None,
    ) -> None:
        self.subtract_(y_TD, value_TD)
        self.grow_(y_TD, factor, side)
        if centre_TD is not None:
            y_TD.add_(centre_TD)


@dataclass(frozen=True)
class Float(_StepByStep):
    """Streams are floating point, as the paper has them: nothing is kept, and dividing by a factor f
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

    def added(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        # Autocast computes sublayers in lower precision than the streams are held in.
        return x_BLD + value_BLD.to(x_BLD.dtype)

    def side_bytes(self, columns: int, factor: float) -> int:
        return 0

    def shrink_(self, x_TD: Tensor, factor: float, keep: bool = True) -> None:
        if factor != 1.0:
            x_TD.mul_(factor)

    def grow_(self, x_TD: Tensor, factor: float, side: Tensor | None) -> None:
        if factor != 1.0:
            x_TD.div_(factor)

    def add_(self, x_TD: Tensor, value_TD: Tensor, watch: Tensor | None = None) -> None:
        x_TD.add_(value_TD.to(x_TD.dtype))

    def subtract_(self, x_TD: Tensor, value_TD: Tensor) -> None:
        x_TD.sub_(value_TD.to(x_TD.dtype))


class ChannelSteps:
    """A fixed-point step 2⁻ᵏ for each channel: k (D,), whole numbers of any sign, on the CPU.

    The vectors 2ᵏ and 2⁻ᵏ that streams are multiplied with are made once a device. Two are equal only if they are one
    object: an arithmetic that holds other steps is another arithmetic.
    """

    def __init__(self, bits_D: Tensor) -> None:
        self._bits: list[int] = bits_D.tolist()
        self._powers: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def bits_D(self) -> Tensor:  # noqa: N802  # the shape suffix of the tensors it stands for
        """k (D,), int16."""
        return torch.tensor(self._bits, dtype=torch.int16)

    def powers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(2ᵏ, 2⁻ᵏ), each (D,), float32, on `device`."""
        if device not in self._powers:
            # By numpy: constants of a model are no allocation of the step that happens to be the first.
            both = (np.ldexp(np.float32(1), np.array(self._bits) * sign) for sign in (1, -1))
            up, down = (torch.from_numpy(power.astype(np.float32)) for power in both)
            self._powers[device] = up.to(device), down.to(device)
        return self._powers[device]


@dataclass(frozen=True)
class FixedPoint(_StepByStep):
    """Streams are integers in steps of 2⁻ᵏ: int32 holds values from −2³¹⁻ᵏ up to 2³¹⁻ᵏ.

    step_bits: k, one for all channels or one a channel: a channel of a language model may hold values thousands of
        times those of another (docs/design.md 3). Integers, shifts and side bits do not see it.
    wide: int64 instead of int32. They hold 2⁵², so many as float64 tells apart; steps may then be so fine that nothing
        is lost of a float32.
    lift, add: a floating-point value is rounded to the step; the gradient passes straight through.
    shrink by 2⁻ᵐ, m = 0 .. 8: x >> m (the floor); its m low bits are put aside, packed (bits.py).
    Every operation is one on integers that recomputation reproduces, so the inverse is exact at any depth.
    A factor that is no power of two raises ValueError.
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
        m = side_bits(factor)
        if m == 0:
            return None
        # To uint8 an integer goes by its lowest eight bits, a negative one too.
        side = bits.pack(x_TD.to(torch.uint8).bitwise_and_((1 << m) - 1), m) if keep else None
        x_TD.bitwise_right_shift_(m)
        return side

    def grow_(self, x_TD: Tensor, factor: float, side: Tensor | None) -> None:
        m = side_bits(factor)
        if m == 0:
            return
        assert side is not None
        x_TD.bitwise_left_shift_(m).bitwise_or_(bits.unpack(side, m, x_TD.shape[-1]))

    def add_(self, x_TD: Tensor, value_TD: Tensor, watch: Tensor | None = None) -> None:
        scaled_TD = self.scaled(value_TD).round_()
        steps_TD = scaled_TD.to(self.dtype)
        if watch is not None:
            # The sum once more in floating point, which does not wrap round at the end of the range.
            _raise_to(watch, scaled_TD.add_(x_TD))
        x_TD.add_(steps_TD)

    def subtract_(self, x_TD: Tensor, value_TD: Tensor) -> None:
        x_TD.sub_(self.scaled(value_TD).round_().to(self.dtype))

    def couple_(
        self, x_TD: Tensor, centre_TD: Tensor | None, value_TD: Tensor, factor: float, keep: bool, watch: Tensor | None
    ) -> Tensor | None:
        if not fused.usable(x_TD, value_TD):
            return super().couple_(x_TD, centre_TD, value_TD, factor, keep, watch)
        width = self.side_bytes(x_TD.shape[-1], factor)
        side = x_TD.new_empty(x_TD.shape[0], width, dtype=torch.uint8) if keep and width else None
        m, scale = side_bits(factor), self.scale(x_TD.device)
        fused.forward_(x_TD, centre_TD, value_TD, side, m=m, scale=scale, watch=watch)
        return side

    def uncouple_(
        self, y_TD: Tensor, centre_TD: Tensor | None, value_TD: Tensor, factor: float, side: Tensor | None
    ) -> None:
        if not fused.usable(y_TD, value_TD):
            super().uncouple_(y_TD, centre_TD, value_TD, factor, side)
            return
        fused.inverse_(y_TD, centre_TD, value_TD, side, m=side_bits(factor), scale=self.scale(y_TD.device))

    def scaled(self, value: Tensor) -> Tensor:
        """value / step, a new tensor, in float32 (float64 where the value is)."""
        return value.detach().to(_wide(value.dtype)) * self.scale(value.device)


@dataclass(frozen=True)
class StraightThrough:
    """FixedPoint's numbers as multiples of the step in float64, which holds them all: the same values, reached by
    other operations, for reference autograd. Rounding passes gradients on as they are."""

    fixed: FixedPoint

    def lifted(self, h_BLD: Tensor) -> Tensor:
        return self._rounded(h_BLD)

    def read(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        return x_BLD if dtype == torch.float64 else x_BLD.to(torch.float32).to(dtype)

    def shrunk(self, x_BLD: Tensor, factor: float) -> Tensor:
        if side_bits(factor) == 0:
            return x_BLD
        product_BLD, unit = x_BLD * factor, self.fixed.unit(x_BLD.device)
        exact_BLD = (product_BLD.detach() / unit).floor_().mul_(unit)
        return _PassThrough.apply(product_BLD, exact_BLD)  # type: ignore[no-untyped-call, no-any-return]

    def added(self, x_BLD: Tensor, value_BLD: Tensor) -> Tensor:
        return x_BLD + self._rounded(value_BLD)

    def _rounded(self, value: Tensor) -> Tensor:
        rounded = self.fixed.scaled(value).round_().double().mul_(self.fixed.unit(value.device))
        return _PassThrough.apply(value, rounded)  # type: ignore[no-untyped-call, no-any-return]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which values of `dtype` are scaled to steps and back."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _PassThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = value.dtype
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def side_bits(factor: float) -> int:
    """m of a factor 2⁻ᵐ, 0 to 8. Raises ValueError for any other factor."""
    mantissa, exponent = math.frexp(factor)
    m = 1 - exponent
    if mantissa != 0.5 or not 0 <= m <= bits.MAX_BITS:
        raise ValueError(f"factor {factor} is not 1, 1/2, 1/4 ... 1/{2**bits.MAX_BITS}, which exact reversal needs")
    return m


def _raise_to(watch: Tensor | None, value: Tensor) -> None:
    """watch = max(watch, |value|), on the device; NaN is the largest of all."""
    if watch is not None:
        low, high = torch.aminmax(value)
        torch.maximum(watch, torch.maximum(-low, high).to(watch.dtype), out=watch)
