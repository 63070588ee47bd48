"""Which layers ran again in the backward pass: those whose first module without submodules ran again.

A layer of which only the end runs again, such as a tiled feed-forward part, does not count as checkpointed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_layers import GradientCheckpointingLayer

from meftbench.measuring.step import Step
from meftbench.methods.levers.base import LayerRuns, Runs


@contextmanager
def watched(step: Step) -> Iterator[Runs]:
    """Within it, hooks note which layers run in forward and again in backward; afterwards they are removed."""
    all_runs, hooks = Runs(), []
    inner = {id(module) for stack in step.applied.stacks for module in stack.modules()}
    names = {id(module): name for name, module in step.model.named_modules()}
    for module in step.model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inner:
            runs = LayerRuns(names[id(module)])
            all_runs.layers.append(runs)
            hooks += [*_on_leaves(step, module, runs), module.register_forward_hook(_noting_output(step, runs))]
    for stack in step.applied.stacks:
        for block in stack.blocks:
            trained = any(parameter.requires_grad for parameter in block.parameters())
            runs = LayerRuns(names[id(block)], wanted=trained)
            all_runs.blocks.append(runs)
            hooks += _on_leaves(step, block, runs)
    try:
        yield all_runs
    finally:
        for hook in hooks:
            hook.remove()


def _on_leaves(step: Step, layer: nn.Module, runs: LayerRuns) -> list[Any]:
    def note(module: nn.Module, *_: Any) -> None:
        if step.phase == "forward" and runs.first is None:
            runs.first = module
        elif step.phase == "backward" and module is runs.first:
            runs.again = True

    leaves = [module for module in layer.modules() if not any(module.children())]
    return [leaf.register_forward_pre_hook(note) for leaf in leaves]


def _noting_output(step: Step, runs: LayerRuns) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if step.phase == "forward":
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            runs.wanted = runs.wanted or any(tensor.requires_grad for tensor in tensors)

    return note
