"""`+compile` (a lever): torch.compile of what layers compute, but not of the engine that reverses the layers.

Of a reversible layer, the token-wise work and the pre-norm are compiled, as one function that all layers share. The
core of attention is not compiled, because its hooks pass gradients on one by one (reversible/fork.py). Forward pass and
recomputation call the same compiled function on the same shapes, so that reversal stays exact.

With a budget, what a compiled function saves for its backward is limited to a share of torch's default, and the rest is
computed again in its backward (torch._functorch.config.activation_memory_budget). Each layer is compiled by itself, so
that 0 is checkpointing of each layer; of a reversible layer it limits what one tile holds. The peak of a step does not
always fall with the budget (reports/compile-budget).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from meftbench.backbones import layouts_of
from meftbench.catalogue.levers import CompileSettings
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, LeverNumber, WatchedStep
from meftbench.reversible import Block, Relay, ReversibleStack, SubLayer

BACKEND = "inductor"  # of torch.compile


@dataclass(frozen=True)
class WithinBudget:
    """BACKEND under a memory budget: a backend of torch.compile, called with the graph of each compiled region."""

    budget: float

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        # The forward pass is what asks for a graph, and with it forward and backward are parted from each other.
        with torch._functorch.config.patch(activation_memory_budget=self.budget):
            return lookup_backend(BACKEND)(graph, inputs, **options)


def _backend(budget: float | None) -> str | WithinBudget:
    return BACKEND if budget is None else WithinBudget(budget)


@dataclass(frozen=True)
class Compiled:
    """A module-level function, compiled at its first call. It can be pickled, unlike the result of torch.compile."""

    function: Callable[..., Tensor]
    budget: float | None = None

    def __call__(self, *args: Any) -> Tensor:
        result: Tensor = _compiled(self.function, self.budget, compiler.get())(*args)
        return result


# One graph for each input size: a graph for all sizes may round differently, and torch would switch to it when it meets
# a second size.
def _by_torch(function: Callable[..., Any], budget: float | None) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, backend=_backend(budget), dynamic=False)
    return compiled


# What compiles a function within a budget. A prediction, which has no device to compile for, sets another.
compiler: ContextVar[Callable[..., Any]] = ContextVar("compiler", default=_by_torch)


@cache
def _compiled(function: Callable[..., Tensor], budget: float | None, by: Callable[..., Any]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = by(function, budget)
    return compiled


class Compile(Lever):
    """The sublayers of reversible blocks, and all other layers as a whole, are compiled at their first call."""

    def __init__(self, settings: CompileSettings) -> None:
        self.budget = settings.budget

    def apply(self, applied: Applied) -> None:
        for stack in applied.stacks:
            for block in stack.blocks:
                assert isinstance(block, Block)
                block.sublayers = tuple(_with_compiled_work(part, self.budget) for part in block.sublayers)
        model: Any = applied.model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # the model inside peft's wrapper
        for layout in applied.layouts or layouts_of(model):
            for layer in layout.list_of(model)[2]:
                if not isinstance(layer, ReversibleStack | Relay):
                    layer.compile(backend=_backend(self.budget), dynamic=False)

    def without(self) -> AbstractContextManager[object]:
        # The reference run uses the same compiled kernels: uncompiled code rounds differently, which is no error of the
        # method.
        return nullcontext()

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


def _with_compiled_work(sublayer: SubLayer, budget: float | None) -> SubLayer:
    """The sublayer with its token-wise work and its pre-norm compiled."""
    return replace(
        sublayer,
        tokens=None if sublayer.tokens is None else Compiled(sublayer.tokens, budget),
        before=None if sublayer.before is None else Compiled(sublayer.before, budget),
    )
