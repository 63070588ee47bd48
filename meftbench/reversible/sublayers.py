"""What a sublayer (F or G of a reversible block) computes, and in which pieces.

Everything in a transformer layer but attention acts on each token alone. So a sublayer is a core, which needs whole
samples (attention: q, k, v and their mixture), followed by token-wise work (output projection, norms, feed-forward,
adapters), which may run on one tile of tokens after the other (docs/design.md 4). Forward and backward take the same
pieces in the same order.

Shape suffixes: B samples, L positions, D hidden size, E width of the core's output; T tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meftbench.reversible.kernels import taken
from meftbench.reversible.taps import asked, joined_rows, pass_on, tapped_in

# (block, h_BLD, part, parts, *args, **kwargs) -> (B, L, E / parts): a part is a group of heads.
Core = Callable[..., Tensor]
# (block, o_1TE of the core or None, h_1TD) -> (1, T, D)
Tokens = Callable[..., Tensor]
# (block, h_1TD) -> (1, T, D)
Before = Callable[..., Tensor]

MOST_TILES = 32  # a tile of a feed-forward's wide tensor (4·D) is then an eighth of a stream; more would save little
CPU_TILE = 4096  # tokens; with fewer, matrix products are slower


@dataclass(frozen=True)
class SubLayer:
    """F or G: tokens(block, core(block, before(block, h)), h).

    before: None (the core reads h itself), or a pre-norm, called for each tile as before(block, h_1TD). It must treat
        each token alone and draw no random numbers: backward runs it again after the core, a tile at a time, so that
        its activations exist for one tile only.
    core: None, or called for each part as core(block, h_BLD, part, parts, *args, **kwargs) with what the model passes
        its layers; the parts' outputs are joined along the last dimension.
    tokens: None (the core's output is the value, in one part), or called for each tile as
        tokens(block, o_1TE, h_1TD), where o is None without a core.  It must treat each token alone.
    All find their modules through `block`, so that a copied block uses its own.
    Raises ValueError: there is neither a core nor tokens, or there is a `before` without a core.
    """

    core: Core | None
    tokens: Tokens | None
    before: Before | None = None

    def __post_init__(self) -> None:
        if self.core is None and self.tokens is None:
            raise ValueError("a sublayer needs a core, tokens, or both")
        if self.core is None and self.before is not None:
            raise ValueError("before prepares what a core reads; this sublayer has none")

    @staticmethod
    def of(function: Callable[..., Tensor] | SubLayer) -> SubLayer:
        """A sublayer from a plain function f(block, h_BLD, *args, **kwargs) -> (B, L, D), which is never tiled."""
        return function if isinstance(function, SubLayer) else SubLayer(_Whole(function), None)

    def parts(self, requested: int) -> int:
        """The number of parts that the core runs in; 0 without a core."""
        return 0 if self.core is None else requested if self.tokens is not None else 1

    def reference(
        self, block: nn.Module, h_BLD: Tensor, tiles: list[slice], parts: int, args: tuple[Any, ...], kwargs: Any
    ) -> Tensor:
        """The value (B, L, D) for reference autograd, computed in the same pieces in the same order."""
        read_BLD = h_BLD if self.before is None else self.before(block, h_BLD)
        outputs = [self.core(block, read_BLD, p, self.parts(parts), *args, **kwargs) for p in range(self.parts(parts))]  # type: ignore[misc]
        if self.tokens is None:
            return outputs[0]
        flat = [output.flatten(0, 1) for output in outputs]
        h_TD = h_BLD.flatten(0, 1)
        values = on_tiles(lambda rows: self.tokens(block, joined(flat, rows), h_TD[rows][None]), tiles)  # type: ignore[misc]
        return torch.cat(values, 1).view(h_BLD.shape)


@dataclass(frozen=True)
class _Whole:
    """A core that runs in one part, from a plain function."""

    function: Callable[..., Tensor]

    def __call__(self, block: nn.Module, h_BLD: Tensor, part: int, parts: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(block, h_BLD, *args, **kwargs)


def on_tiles(function: Callable[[slice], Tensor], tiles: list[slice]) -> list[Tensor]:
    """The value of `function` for the rows of each tile; what is tapped in it is passed on for all tiles together."""
    values, tapped = [], []
    for rows in tiles:
        of_tile: list[Tensor] = []
        with tapped_in(of_tile if asked() else None):
            values.append(function(rows))
        tapped.append(of_tile)
    pass_on(joined_rows(tapped))
    return values


def joined(outputs: list[Tensor], rows: slice) -> Tensor | None:
    """The tokens `rows` of the core's outputs (B·L, E / parts), side by side: (1, T, E). None without a core."""
    if not outputs:
        return None
    return outputs[0][rows][None] if len(outputs) == 1 else torch.cat([o[rows] for o in outputs], -1)[None]


def tiles_of(tokens: int, requested: int | Literal["auto"], width: int, device: torch.device) -> list[slice]:
    """The B·L `tokens` cut into `requested` tiles of one size, of which the last may be smaller: the rows of each.
    Where there would be fewer tiles then, since few tokens are cut into many, their sizes differ by one at most.

    "auto": as many tiles, at most 32, as leave each large enough to keep the device busy: 4,096 tokens; on CUDA also
    four waves of 128 × 128 blocks in the matrix product that widens `width` fourfold.
    """
    count = min(_auto_count(tokens, width, device) if requested == "auto" else requested, tokens)
    return list(_even_slices(tokens, max(count, 1)))


def _auto_count(tokens: int, width: int, device: torch.device) -> int:
    processors = taken().multiprocessors
    if processors is None and device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    if processors is not None:
        return tiles_that_fill(tokens, width, processors)
    return min(tokens // CPU_TILE, MOST_TILES)


def tiles_that_fill(tokens: int, width: int, processors: int) -> int:
    """The number of tiles that "auto" takes for `tokens` on a GPU with that many multiprocessors."""
    per_tile = max(CPU_TILE, 4 * processors * 128 * 128 // (4 * width))
    return min(tokens // per_tile, MOST_TILES)


def _even_slices(tokens: int, count: int) -> Iterator[slice]:
    largest = -(-tokens // count)
    if largest * (count - 1) < tokens:
        # Of one size, so that what one tile gives back to the allocator fits the next exactly.
        yield from (slice(start, min(start + largest, tokens)) for start in range(0, tokens, largest))
        return
    size, larger = divmod(tokens, count)
    start = 0
    for tile in range(count):
        stop = start + size + (tile < larger)
        yield slice(start, stop)
        start = stop
