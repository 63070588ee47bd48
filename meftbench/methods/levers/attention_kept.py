"""Fused attention operators under selective checkpointing: their results are kept, and their runs are observed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def keeping_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of torch's checkpoint under which attention's output and its log-sum-exp are kept.

    A function of a module, so that a model that holds it can be copied and pickled.
    """
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]] = create_selective_checkpoint_contexts(
        _policy
    )
    return contexts


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_fused_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def is_fused_attention(operator: Any) -> bool:
    """Whether the operator computes attention in one kernel: torch's (flash, efficient, cuDNN, that of CPUs), or one
    that a package of attention kernels has registered."""
    name = operator.name() if hasattr(operator, "name") else str(operator)
    return ("attention" in name or "attn" in name) and not ("backward" in name or "bwd" in name)


@dataclass
class AttentionRuns:
    """How often fused attention operators ran while layers ran, by the layer's name.

    again: those that ran in the backward pass.
    """

    forward: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    running: str = ""

    def note(self) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        (self.again if in_backward else self.forward)[self.running] += 1


@contextmanager
def attention_watched(layers: Mapping[str, nn.Module]) -> Iterator[AttentionRuns]:
    """Within it, runs of fused attention operators are counted. layers: by name; those of others count for ""."""
    runs = AttentionRuns()
    with ExitStack() as watching:
        for name, layer in layers.items():
            for leaf in (module for module in layer.modules() if not any(module.children())):

                def enter(*_: Any, name: str = name) -> None:
                    runs.running = name

                watching.callback(leaf.register_forward_pre_hook(enter).remove)
        watching.enter_context(_Noting(runs))
        yield runs


class _Noting(TorchDispatchMode):
    def __init__(self, runs: AttentionRuns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._runs = runs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_fused_attention(func):
            self._runs.note()
        return func(*args, **kwargs or {})
