"""What is watched while streams run: their range in the forward pass, and in strict mode that backward restores them.

Nothing here waits for the device in the middle of a pass: findings are gathered on the device and read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meftbench.errors import UserError


class StreamError(UserError, ArithmeticError):
    """A stream cannot be held or was not restored. `where` names the layer."""


class Range:
    """The largest |x| that each sublayer wrote, in steps.

    limit: in steps; a stream must stay below it.  unit: a step, the same for all channels or (D,).
    One more place than sublayers is for the stack's input.
    """

    def __init__(self, blocks: int, limit: float, unit: float | Tensor, device: torch.device) -> None:
        self._levels = torch.zeros(2 * blocks + 1, device=device)
        self._limit, self._unit = limit, unit
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def input(self) -> Tensor:
        """Where the stack's input is noted."""
        return self._levels[-1]

    def of(self, index: int, sublayer: int) -> Tensor:
        """Where what a sublayer writes is noted."""
        return self._levels[2 * index + sublayer]

    def begin_copy(self) -> None:
        """Send the findings to the host without waiting for them."""
        if self._levels.device.type != "cuda":
            self._host = self._levels
            return
        self._host = torch.empty(self._levels.shape, pin_memory=True)
        self._host.copy_(self._levels, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def left(self) -> bool:
        """Whether a stream left the range, NaN and infinity included. Waits for the forward pass, once."""
        return any(not level < self._limit for level in self._found())

    def check(self, first_layer: int) -> None:
        """Raises StreamError at the first sublayer that left the range. Waits for the forward pass, once."""
        levels = self._found()
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

    def _found(self) -> list[float]:
        """The levels; none where nothing was computed."""
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
    """Sums of the streams at some blocks, over each row and column: any element that differs changes two of them.

    To be called as an observer of a stack. A difference is counted on the device; `check` reads the counts, once.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self.blocks = frozenset(blocks)
        self._true: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._wrong: dict[int, Tensor] = {}

    def __call__(self, direction: str, block: int, streams: list[Tensor]) -> None:
        if block not in self.blocks:
            return
        sums = [_sums(stream) for stream in streams]
        if direction == "forward":
            self._true[block] = sums
            return
        pairs = zip(sums, self._true[block], strict=True)
        self._wrong[block] = torch.stack([_differing(found, true) for found, true in pairs]).sum()

    def check(self, first_layer: int) -> None:
        """Raises StreamError for the highest block whose inputs were not restored bit for bit."""
        for block in sorted(self._wrong, reverse=True):
            if _uncomputed(self._wrong[block]):
                return
            tokens = int(self._wrong[block])
            if tokens:
                cure = "this layer or one above computes otherwise in backward than in forward: look for state it has"
                where = f"layer {first_layer + block}"
                raise StreamError(where, f"its inputs were not restored exactly ({tokens} tokens differ)", cure)


def _uncomputed(tensor: Tensor | None) -> bool:
    """Whether it is a shape without values: a step that is traced."""
    return isinstance(tensor, FakeTensor) or (tensor is not None and tensor.is_meta)


def _differing(found: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens whose sums differ; at least 1 where only a column's does."""
    return torch.maximum((found[0] != true[0]).sum(), (found[1] != true[1]).any().to(torch.int64))


def sampled(blocks: int) -> list[int]:
    """The blocks that strict mode looks at: the lowest, which sees the errors of all above it, middle and top."""
    return sorted({0, blocks // 2, blocks - 1})


def _sums(stream_BLD: Tensor) -> tuple[Tensor, Tensor]:
    stream_TD = stream_BLD.flatten(0, 1)
    return stream_TD.sum(1, dtype=torch.int64), stream_TD.sum(0, dtype=torch.int64)
