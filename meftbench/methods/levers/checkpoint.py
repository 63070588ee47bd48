"""`+checkpoint`: keep only the input of each layer, and run the layer again in the backward pass (a lever)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from meftbench.errors import UserError
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, WatchedStep, held_at


class Checkpoint(Lever):
    """Non-reentrant checkpointing of whole layers.

    In reversible stacks each block is checkpointed instead of being reversed, with the same equations.

    Source: torch.utils.checkpoint; transformers' gradient_checkpointing_enable.
    """

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def apply(self, applied: Applied) -> None:
        stacks = applied.stacks
        reversible = {id(module) for stack in stacks for module in stack.modules()}
        model: Any = applied.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            what = "transformers cannot checkpoint its layers"
            raise UserError(type(model).__name__, what, "leave checkpoint out, or take another model")
        # Renamed in transformers 5. The first argument of both holds the keyword arguments of torch's checkpoint.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        # transformers also makes the output of the embeddings require grad, for reentrant checkpointing. Here it would
        # only add activations below the first trained weight, which autograd need not keep (docs/measuring.md 4).
        model.disable_input_require_grads()
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
        for layer in layers:
            if id(layer) in reversible:
                layer.gradient_checkpointing = False  # the block around it is checkpointed
        for stack in stacks:
            stack.activations = "checkpoint"
        self._layers = [layer for layer in layers if id(layer) not in reversible]
        applied.recomputes = True

    @contextmanager
    def without(self) -> Iterator[None]:
        with ExitStack() as switched_off:
            for layer in self._layers:
                switched_off.enter_context(held_at(layer, "gradient_checkpointing", False))
            yield

    def missing(self, seen: WatchedStep) -> str | None:
        # It is not enough that tiles of a feed-forward run again: a layer must run again from its beginning.
        layers = [layer for layer in [*seen.runs.layers, *seen.runs.blocks] if layer.wanted]
        left_out = [layer.name for layer in layers if not layer.again]
        if len(left_out) == len(layers):
            return "no layer ran again in backward"
        if left_out:
            return f"{left_out[0]} did not run again in backward ({len(left_out)} of {len(layers)})"
        return None
