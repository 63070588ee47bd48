"""`+compile`: torch.compile on what layers compute; the engine that reverses them stays outside of it.

Of a reversible layer, the token-wise work and the pre-norm are compiled, one function shared by all layers; attention's
core is not, since it hands gradients on one by one (reversible/fork.py). Forward and recomputation call the same
compiled function on the same shapes, so that reversal stays exact.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from meftbench.backbones import layouts_of
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, LeverNumber, WatchedStep
from meftbench.reversible import Block, Relay, ReversibleStack, SubLayer


@dataclass(frozen=True)
class Compiled:
    """A function with a name, compiled at its first call: unlike what torch.compile gives, it can be pickled."""

    function: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Tensor:
        result: Tensor = _compiled(self.function)(*args)
        return result


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A graph for each size: one for all sizes may round otherwise, and would replace the first one half-way.
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return compiled


class Compile(Lever):
    """The sublayers of reversible blocks, and other layers whole, are compiled at their first call."""

    def apply(self, applied: Applied) -> None:
        for stack in applied.stacks:
            for block in stack.blocks:
                assert isinstance(block, Block)
                f, g = block.sublayers
                block.sublayers = (_with_compiled_work(f), _with_compiled_work(g))
        model: Any = applied.model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # peft has its own wrapper around
        for layout in applied.layouts or layouts_of(model):
            for layer in layout.list_of(model)[2]:
                if not isinstance(layer, ReversibleStack | Relay):
                    layer.compile(dynamic=False)

    def without(self) -> AbstractContextManager[object]:
        return nullcontext()  # the same kernels: compiled code rounds otherwise, which is no fault of the method

    def missing(self, seen: WatchedStep) -> str | None:
        return None if _counters()["stats"]["unique_graphs"] else "nothing was compiled"

    def numbers(self) -> dict[str, LeverNumber]:
        counters = _counters()
        return {
            "compiled_graphs": LeverNumber(counters["stats"]["unique_graphs"], "measured"),
            "graph_breaks": LeverNumber(sum(counters["graph_break"].values()), "measured"),
        }


def _counters() -> Any:
    return torch._dynamo.utils.counters


def _with_compiled_work(sublayer: SubLayer) -> SubLayer:
    return replace(
        sublayer,
        tokens=None if sublayer.tokens is None else Compiled(sublayer.tokens),
        before=None if sublayer.before is None else Compiled(sublayer.before),
    )
