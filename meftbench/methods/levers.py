"""What composes with any method by `+`. A lever changes how activations are held, never what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones import Layout, base_of, layouts_of
from meftbench.backbones.split import check_in_tiles, check_split
from meftbench.errors import UserError
from meftbench.methods.applied import Applied, refuse_asked
from meftbench.reversible import Relay, ReversibleStack
from meftbench.reversible.tiled import LEVER_TILES, Tiling

# True while a copy to the host is made: on a machine without an accelerator host and device are one memory, and
# whoever counts device bytes must be able to tell them apart (probes.memory_counted).
_MEMORYLESS = ("cpu", "meta")  # devices without a memory of their own
copying_to_host: ContextVar[bool] = ContextVar("copying_to_host", default=False)


def checkpoint(applied: Applied) -> None:
    """Keep only the input of each layer, run the layer again in backward (non-reentrant).

    On reversible stacks: each block is checkpointed instead of reversed, through the same equations.
    Source: torch.utils.checkpoint; transformers' gradient_checkpointing_enable.
    """
    stacks = applied.stacks
    reversible = {id(module) for stack in stacks for module in stack.modules()}
    model: Any = applied.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        what = "transformers cannot checkpoint its layers"
        raise UserError(type(model).__name__, what, "leave checkpoint out, or take another model")
    # Renamed in transformers 5; the first argument of both is the keyword arguments of torch's `checkpoint`.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    # transformers also makes the embedding output require grad, for the reentrant kind. Here it would only bring
    # back what autograd prunes below the first trained weight (MEASURING 5, no. 22).
    model.disable_input_require_grads()
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for layer in layers:
        if id(layer) in reversible:
            layer.gradient_checkpointing = False  # the block around it is checkpointed
    for stack in stacks:
        stack.activations = "checkpoint"
    switched = [layer for layer in layers if id(layer) not in reversible]

    @contextmanager
    def without() -> Iterator[None]:
        for layer in switched:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in switched:
                layer.gradient_checkpointing = True

    applied.ordinary_switches.append(without)
    applied.recomputes = True


class Offload:
    """Tensors saved for backward wait in host memory, pinned where there is an accelerator.

    As torch.autograd.graph.save_on_cpu, but parameters and buffers, which stay on the device anyway, are not
    moved, and a storage that several operations saved is moved once.  moved_bytes: since the last `reset`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.moved_bytes = 0
        self.enabled = True
        self._model = model

    def reset(self) -> None:
        self.moved_bytes = 0

    def __call__(self) -> AbstractContextManager[object]:
        if not self.enabled:
            return ExitStack()
        resident = {t.untyped_storage()._cdata for t in [*self._model.parameters(), *self._model.buffers()]}

        def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
            if tensor.layout is not torch.strided or tensor.untyped_storage()._cdata in resident:
                return None, tensor
            token = copying_to_host.set(True)
            try:
                pinned, where = tensor.device.type not in _MEMORYLESS, "meta" if tensor.is_meta else "cpu"
                host = torch.empty(tensor.size(), dtype=tensor.dtype, device=where, pin_memory=pinned)
                host.copy_(tensor, non_blocking=pinned)
            finally:
                copying_to_host.reset(token)
            self.moved_bytes += host.nbytes
            return tensor.device, host

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, tensor = packed
            if device is None:
                return tensor
            return tensor.clone() if device.type in _MEMORYLESS else tensor.to(device, non_blocking=True)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def offload(applied: Applied) -> None:
    """Hold what backward needs in host memory; with `+checkpoint`: the checkpoints."""
    hooks = Offload(applied.model)
    applied.around_forward = hooks

    @contextmanager
    def without() -> Iterator[None]:
        hooks.enabled = False
        try:
            yield
        finally:
            hooks.enabled = True

    applied.ordinary_switches.append(without)


def tiled_mlp(applied: Applied) -> None:
    """Run every feed-forward in 16 tiles of tokens, again in backward (reversible/tiled.py); on reversible stacks,
    whose own passes do so without running anything twice: their tiles, if no number of them was asked for."""
    model: Any = applied.model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # peft has its own wrapper around
    layouts = applied.layouts or layouts_of(model)
    if not applied.layouts:
        check_split(model, layouts)
    for layout in () if applied.stacks else layouts:
        check_in_tiles(model, layout, reversible=False)
    tiling = applied.tiling = Tiling()
    base_of(model).register_forward_pre_hook(_without_router_logits, with_kwargs=True)
    for stack in applied.stacks:
        stack.tiles = LEVER_TILES if stack.tiles in (1, "auto") else stack.tiles
    for layout in layouts:
        for layer in layout.list_of(model)[2]:
            if not isinstance(layer, ReversibleStack | Relay):
                # By a partial: it is copied and pickled with the layer, and parameters keep their names.
                layout.run_feed_forward_by(layer, partial(_in_tiles, tiling, layer, layout))
                applied.recomputes = True

    @contextmanager
    def without() -> Iterator[None]:
        tiling.recompute = False
        try:
            yield
        finally:
            tiling.recompute = True

    applied.ordinary_switches.append(without)


def _without_router_logits(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Taken from inside a feed-forward that runs in tiles, they would be those of one tile, without a gradient.
    what = "the loss of a mixture's router needs its feed-forwards whole"
    refuse_asked(base, kwargs, ("output_router_logits",), what, "leave tiled_mlp out, or do not ask for it")


def _in_tiles(tiling: Tiling, layer: nn.Module, layout: Layout, h_BLD: Tensor) -> Tensor:
    trained: list[Tensor] = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return tiling.run(partial(layout.feed_forward, layer), h_BLD, trained)
