"""`+tiled_mlp` (a lever): feed-forwards run in tiles of tokens, recomputed in backward (reversible/tiled.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from meftbench.backbones import Layout, layouts_of
from meftbench.backbones.split import check_in_tiles, check_split
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, WatchedStep, held_at
from meftbench.methods.router_logits import pass_router_logits_on
from meftbench.reversible import Relay, ReversibleStack
from meftbench.reversible.tiled import LEVER_TILES, Tiling


class TiledMlp(Lever):
    """Every feed-forward runs in 16 tiles of tokens, and each tile runs again in the backward pass.

    Reversible stacks recompute in tiles themselves: for them only the number of tiles is set to 16, where the settings
    say 1 or auto.
    tiling: how feed-forwards of ordinary layers are tiled.
    """

    def __init__(self) -> None:
        self.tiling = Tiling()
        self._ran_before = self._recomputed_before = 0

    def apply(self, applied: Applied) -> None:
        model: Any = applied.model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # the model inside peft's wrapper
        layouts = applied.layouts or layouts_of(model)
        if not applied.layouts:
            check_split(model, layouts)
        for layout in () if applied.stacks else layouts:
            check_in_tiles(model, layout, reversible=False)
        pass_router_logits_on(model)
        for stack in applied.stacks:
            stack.tiles = LEVER_TILES if stack.tiles in (1, "auto") else stack.tiles
        for layout in layouts:
            for layer in layout.list_of(model)[2]:
                if not isinstance(layer, ReversibleStack | Relay):
                    # A partial is copied and pickled with the layer, and parameters keep their names.
                    layout.run_feed_forward_by(layer, partial(_in_tiles, self.tiling, layer, layout))
                    applied.recomputes = True

    def without(self) -> AbstractContextManager[object]:
        return held_at(self.tiling, "recompute", False)

    @contextmanager
    def watched(self, applied: Applied) -> Iterator[None]:
        self._ran_before, self._recomputed_before = self.tiling.ran, self.tiling.recomputed
        yield

    def missing(self, seen: WatchedStep) -> str | None:
        # At least one tile for each ordinary layer must have run again, and every stack must have several tiles.
        stacks = seen.applied.stacks
        if not seen.backward:
            tiles, layers = self.tiling.ran - self._ran_before, len(seen.runs.layers)
            return None if tiles > layers else f"{tiles} tiles ran, of {layers} layers"
        layers = sum(layer.wanted for layer in seen.runs.layers)
        tiles = self.tiling.recomputed - self._recomputed_before
        if any(stack.tiles == 1 for stack in stacks) or not (layers or stacks) or tiles < layers:
            return f"{tiles} tiles ran again in backward, for {layers} layers"
        return None


def _in_tiles(tiling: Tiling, layer: nn.Module, layout: Layout, h_BLD: Tensor) -> Tensor:
    trained: list[Tensor] = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return tiling.run(partial(layout.feed_forward, layer), h_BLD, trained)
