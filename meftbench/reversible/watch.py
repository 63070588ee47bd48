"""Checks of the streams: their range in the forward pass, and in strict mode that backward restores them.

Nothing here waits for the device in the middle of a pass: results are gathered on the device and read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meftbench.errors import UserError


class StreamError(UserError, ArithmeticError):
    """A stream left the range of its numbers, or was not restored. `where` names the layer."""


class Range:
    """The largest |x|, in steps, that each sublayer wrote to a stream, and that of the stack's input.

    limit: in steps; a stream must stay below it.  unit: the value of a step, one for all channels or (D,).
    """

    def __init__(self, blocks: int, limit: float, unit: float | Tensor, device: torch.device) -> None:
        self._levels = torch.zeros(2 * blocks + 1, device=device)
        self._limit, self._unit = limit, unit
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def input(self) -> Tensor:
        """The element for the largest |x| of the stack's input, to be written to."""
        return self._levels[-1]

    def of(self, index: int, sublayer: int) -> Tensor:
        """The element for the largest |x| that a sublayer writes, to be written to."""
        return self._levels[2 * index + sublayer]

    def begin_copy(self) -> None:
        """Copy the values to the host without waiting for them."""
        if self._levels.device.type != "cuda":
            self._host = self._levels
            return
        self._host = torch.empty(self._levels.shape, pin_memory=True)
        self._host.copy_(self._levels, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def left(self) -> bool:
        """Whether a stream left the range, or holds NaN or infinity. The first call waits for the forward pass."""
        return any(not level < self._limit for level in self._read_levels())

    def check(self, first_layer: int) -> None:
        """The first call waits for the forward pass.

        Raises StreamError: a sublayer, or the input, left the range; it names the first layer where this happened.
        """
        levels = self._read_levels()
        if not levels:
            return
        places = [("the stack's input", levels[-1])]
        places += [(f"layer {first_layer + place // 2}", level) for place, level in enumerate(levels[:-1])]
        for where, level in places:
            if level < self._limit:
                continue
            if not math.isfinite(level):
                what = f"a stream holds {'NaN' if math.isnan(level) else 'infinity'}"
                cure = "lower the learning rate, or use bf16 or fp32 instead of fp16"
            elif isinstance(self._unit, Tensor):
                what, cure = "a stream is outside the range of its channel", "call the model without a cache first"
            else:
                what = f"stream value {level * self._unit:,.0f} is outside ±{self._limit * self._unit:,.0f}"
                bits = math.floor(math.log2(self._limit / (level * self._unit)))
                cure = f"set `step_bits` to auto, or to {bits} or lower" if bits > 0 else "set `step_bits` to auto"
            raise StreamError(where, what, cure)

    def _read_levels(self) -> list[float]:
        """The largest |x| of each sublayer, in order, and of the input; empty where a step is only traced."""
        if self._host is None:
            self.begin_copy()
        if _uncomputed(self._host):
            return []
        if self._copied is not None:
            self._copied.synchronize()
        assert self._host is not None
        levels: list[float] = self._host.tolist()
        return levels


class Fingerprints:
    """Sums of the streams at some blocks, over each row and each column: an element that differs changes two of them.

    It is called as an observer of a stack. Differences are counted on the device; `check` reads the counts, once.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self.blocks = frozenset(blocks)
        self._forward_sums: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._differing_tokens: dict[int, Tensor] = {}

    def __call__(self, direction: str, block: int, streams: list[Tensor]) -> None:
        if block not in self.blocks:
            return
        sums = [_sums(stream) for stream in streams]
        if direction == "forward":
            self._forward_sums[block] = sums
            return
        pairs = zip(sums, self._forward_sums[block], strict=True)
        self._differing_tokens[block] = torch.stack(
            [_differing(restored, original) for restored, original in pairs]
        ).sum()

    def check(self, first_layer: int) -> None:
        """Raises StreamError: inputs were not restored bit for bit; it names the highest such block."""
        for block in sorted(self._differing_tokens, reverse=True):
            if _uncomputed(self._differing_tokens[block]):
                return
            tokens = int(self._differing_tokens[block])
            if tokens:
                cure = "this layer or one above computes otherwise in backward than in forward: look for state it has"
                where = f"layer {first_layer + block}"
                raise StreamError(where, f"its inputs were not restored exactly ({tokens} tokens differ)", cure)


def _uncomputed(tensor: Tensor | None) -> bool:
    """Whether the tensor has a shape but no values, as in a step that is traced."""
    return isinstance(tensor, FakeTensor) or (tensor is not None and tensor.is_meta)


def _differing(restored: tuple[Tensor, Tensor], original: tuple[Tensor, Tensor]) -> Tensor:
    """The number of tokens whose sums differ; at least 1 where only sums of columns do."""
    return torch.maximum((restored[0] != original[0]).sum(), (restored[1] != original[1]).any().to(torch.int64))


def sampled(blocks: int) -> list[int]:
    """The blocks that strict mode checks: the lowest (errors of all above reach it), the middle and the top."""
    return sorted({0, blocks // 2, blocks - 1})


def _sums(stream_BLD: Tensor) -> tuple[Tensor, Tensor]:
    stream_TD = stream_BLD.flatten(0, 1)
    return stream_TD.sum(1, dtype=torch.int64), stream_TD.sum(0, dtype=torch.int64)
