"""`+checkpoint`: keep only the input of each layer, and run the layer again in the backward pass (a lever)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from meftbench.catalogue.levers import CheckpointSettings
from meftbench.errors import UserError
from meftbench.methods.applied import Applied
from meftbench.methods.levers.attention_kept import AttentionRuns, attention_watched, keeping_attention
from meftbench.methods.levers.base import Lever, WatchedStep, held_at


class Checkpoint(Lever):
    """Non-reentrant checkpointing of layers, of all or of some, selective or not (CheckpointSettings).

    In reversible stacks each chosen block is checkpointed instead of being reversed, with the same equations; the other
    blocks keep what they save.

    Source: torch.utils.checkpoint, create_selective_checkpoint_contexts; transformers' activation_checkpointing_enable.
    """

    def __init__(self, settings: CheckpointSettings) -> None:
        self._settings = settings
        self._flagged: list[Any] = []  # modules at which transformers reads whether to checkpoint
        self._attention: AttentionRuns | None = None

    def apply(self, applied: Applied) -> None:
        model: Any = applied.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            what = "transformers cannot checkpoint its layers"
            raise UserError(type(model).__name__, what, "leave checkpoint out, or take another model")
        options = {"context_fn": keeping_attention} if self._settings.keep == "attention" else {}
        # Renamed in transformers 5. The first argument of both holds the keyword arguments of torch's checkpoint.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, **options})
        # transformers also makes the output of the embeddings require grad, for reentrant checkpointing. Here it would
        # only add activations below the first trained weight, which autograd need not keep (docs/measuring.md 4).
        model.disable_input_require_grads()
        layers = layers_of(applied)
        chosen = {id(layers[name]) for name in self._chosen(layers)}
        reversible = {id(module) for stack in applied.stacks for module in stack.modules()}
        whole_layers = {id(layer) for layer in layers.values()}
        for module in [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]:
            # In a reversible stack the block around the layer is checkpointed.
            if id(module) in reversible or (id(module) in whole_layers and id(module) not in chosen):
                module.gradient_checkpointing = False
            else:
                self._flagged.append(module)
        for stack in applied.stacks:
            stack.activations, stack.checkpoint_options = "checkpoint", options
            stack.checkpointed = frozenset(n for n, block in enumerate(stack.blocks) if id(block) in chosen)
        applied.recomputes = True

    def _chosen(self, layers: dict[str, nn.Module]) -> list[str]:
        """Names of the layers that run again in backward. Raises UserError: there are fewer than the settings say."""
        count = len(layers) if self._settings.layers == "all" else self._settings.layers
        if not 1 <= count <= len(layers):
            cure = f"write all, or a number from 1 to {len(layers)}"
            raise UserError("checkpoint(layers)", f"{count} of {len(layers)} layers", cure)
        # The last layers are those that keep what they save: they have freed it when the backward pass comes to a layer
        # that runs again, which needs room for all of its activations.
        return list(layers)[: count : self._settings.every]

    @contextmanager
    def without(self) -> Iterator[None]:
        with ExitStack() as switched_off:
            for module in self._flagged:
                switched_off.enter_context(held_at(module, "gradient_checkpointing", False))
            yield

    @contextmanager
    def watched(self, applied: Applied) -> Iterator[None]:
        with ExitStack() as watching:
            if self._settings.keep == "attention":
                self._attention = watching.enter_context(attention_watched(layers_of(applied)))
            yield

    def missing(self, seen: WatchedStep) -> str | None:
        # It is not enough that tiles of a feed-forward run again: a layer must run again from its beginning.
        layers = layers_of(seen.applied)
        chosen = set(self._chosen(layers))
        runs = [layer for layer in [*seen.runs.layers, *seen.runs.blocks] if layer.wanted]
        asked = [layer.name for layer in runs if layer.name in chosen]
        left_out = [layer.name for layer in runs if layer.name in chosen and not layer.again]
        if len(left_out) == len(asked):
            return "no layer ran again in backward"
        if left_out:
            return f"{left_out[0]} did not run again in backward ({len(left_out)} of {len(asked)})"
        if extra := [layer.name for layer in runs if layer.name not in chosen and layer.again]:
            return f"{extra[0]} ran again in backward, and was to keep what it saves ({len(extra)} such layers)"
        if self._attention is None:
            return None
        return self._attention_missing(self._attention, {name: layers[name] for name in asked})

    def missing_in_trace(self, attention: set[str]) -> str | None:
        if self._settings.keep == "attention" and not attention:
            return "no fused attention operator runs, so that keep=attention would keep nothing"
        return None

    def _attention_missing(self, seen: AttentionRuns, layers: dict[str, nn.Module]) -> str | None:
        unfused = [name for name, layer in layers.items() if _has_attention(layer) and not seen.forward[name]]
        if unfused or not any(seen.forward[name] for name in layers):
            where = unfused[0] if unfused else "any layer"
            return f"no fused attention operator ran in {where}, so that none was kept (without dropout one may)"
        if seen.again:
            name, count = next(iter(seen.again.items()))
            return f"attention ran again in backward in {name} ({count} times)"
        return None


def layers_of(applied: Applied) -> dict[str, nn.Module]:
    """The reversible blocks of a model, and its other layers that transformers can checkpoint, in the model's order and
    by their names in it."""
    stacks = applied.stacks
    blocks = {id(block) for stack in stacks for block in stack.blocks}
    inside = {id(module) for stack in stacks for module in stack.modules()}
    return {
        name: module
        for name, module in applied.model.named_modules()
        if id(module) in blocks or (isinstance(module, GradientCheckpointingLayer) and id(module) not in inside)
    }


def _has_attention(layer: nn.Module) -> bool:
    # transformers' attention modules say whether they are causal; other mixers of tokens, such as a state, do not.
    return any(hasattr(module, "is_causal") for module in layer.modules())
