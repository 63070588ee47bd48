"""`+weight_offload` (a lever): frozen weights of layers are held in host memory, and brought to the device when needed.

accelerate's `cpu_offload` does this for inference. In training, autograd keeps what a layer was computed with, so that
by the end of the forward pass all weights would be on the device. Here autograd keeps a note of each weight instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones import layouts_of
from meftbench.backbones.quantize import is_quantized
from meftbench.errors import UserError
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import Lever, LeverNumber, WatchedStep
from meftbench.methods.levers.saved import Held
from meftbench.methods.levers.transfers import Transfers, allocations_as, on_host, transfers_of
from meftbench.reversible import Relay, ReversibleStack


class WeightOffload(Lever):
    """The frozen weights of at most two layers are on the device: of that which computes, and of the next one.

    Embeddings, heads and norms outside of layers, buffers, and all trained tensors stay on the device.
    """

    def __init__(self) -> None:
        self._weights: HostWeights | None = None

    def apply(self, applied: Applied) -> None:
        model: Any = applied.model
        if is_quantized(model):
            what = "weights in 4 bits, which bitsandbytes makes on the device, cannot wait on the host"
            raise UserError(type(model).__name__, what, "leave weight_offload out, or take another precision")
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # the model inside peft's wrapper
        layers: list[nn.Module] = []
        for layout in applied.layouts or layouts_of(model):
            for layer in layout.list_of(model)[2]:
                if isinstance(layer, ReversibleStack):
                    first = len(layers)
                    layer.entered = partial(self._entered, first)
                    layers += layer.blocks
                elif not isinstance(layer, Relay):
                    layers.append(layer)
        self._weights = HostWeights(layers, applied.model)
        if not self._weights.slots:
            what = "no layer has frozen weights to hold on the host"
            raise UserError(type(model).__name__, what, "leave weight_offload out")
        applied.saving.keepers.insert(0, self._weights)

    def _entered(self, first: int, block: int) -> None:
        assert self._weights is not None
        self._weights.enter(first + block)

    @contextmanager
    def without(self) -> Iterator[None]:
        if self._weights is None:
            yield
            return
        with self._weights.all_on_device():
            yield

    @contextmanager
    def watched(self, applied: Applied) -> Iterator[None]:
        if self._weights is not None:
            self._weights.moved_bytes = self._weights.most_layers = 0
        yield

    def on_host(self) -> Iterator[Tensor]:
        if self._weights is not None:
            self._weights.take_over()
            for slot in self._weights.slots:
                assert slot.host is not None
                yield slot.host

    def missing(self, seen: WatchedStep) -> str | None:
        if self._weights is None or not self._weights.moved_bytes:
            return "no weight was moved to the device"
        if self._weights.most_layers > 2:
            return f"weights of {self._weights.most_layers} layers were on the device at once"
        return None

    def numbers(self) -> dict[str, LeverNumber]:
        moved = self._weights.moved_bytes if self._weights else 0
        return {"weights_moved_bytes": LeverNumber(moved, "counted")}


class HostWeights:
    """The frozen weights of layers in host memory, and of one or two layers on the device as well.

    The weights of a layer are brought when one of its modules is called, or when the backward pass needs one of them;
    those of the layer that comes next are begun to be brought then, too. In between, a weight is a tensor of the same
    shape without memory, so that what reads shapes works as before.

    layers: in the order in which the forward pass calls them.
    moved_bytes: moved to the device; most_layers: on the device at once; both since they were last set to 0.
    """

    def __init__(self, layers: list[nn.Module], model: nn.Module) -> None:
        self.moved_bytes = self.most_layers = 0
        self._model = model
        self._enabled = True
        self._transfers: Transfers | None = None
        self._device = torch.device("meta")
        self._placeholders: dict[torch.dtype, Tensor] = {}
        self._layers: list[list[Slot]] = []
        self._begun: dict[int, list[Any]] = {}  # by layer on the device: what to wait for before it is read
        self._of_storage: dict[int, Slot] = {}  # weights on the device by their storage
        self._leaving = False  # whether all weights leave the device when the backward pass that runs now has ended
        known: set[int] = set()
        for number, layer in enumerate(layers):
            slots = []
            for module in layer.modules():
                frozen = [n for n, p in module._parameters.items() if p is not None and not p.requires_grad]
                own = [name for name in frozen if id(module._parameters[name]) not in known]
                known.update(id(module._parameters[name]) for name in own)
                slots += [Slot(module, name, number) for name in own]
                if own or module is layer:
                    module.register_forward_pre_hook(partial(_enter, self, number))
                if own:
                    module._apply = partial(_moved_without, module, own)  # type: ignore[method-assign]
            self._layers.append(slots)
        self.slots = [slot for slots in self._layers for slot in slots]

    def begin(self) -> bool:
        self._leaving = False  # an exception may have ended a backward pass
        if self._enabled:
            self.take_over()
        return self._enabled

    def take_over(self) -> None:
        """Move those weights to the host that are not there: all at the first step, later any that were replaced."""
        device = next(p.device for p in self._model.parameters() if p.requires_grad)
        if self._transfers is None or device != self._device:
            self._device, self._transfers = device, transfers_of(device)
            stale = self.slots
        else:
            stale = [slot for slot in self.slots if slot.parameter is not slot.taken]
        for slot in stale:
            held = slot.host if slot.parameter is slot.taken else slot.parameter.data
            assert held is not None
            slot.host, slot.taken = on_host(held, device), slot.parameter
            slot.parameter.data = self._placeholder(slot.parameter, device)

    def _placeholder(self, parameter: Tensor, device: torch.device) -> Tensor:
        empty = self._placeholders.get(parameter.dtype)
        if empty is None or empty.device != device or type(empty) is not type(parameter.data):
            empty = self._placeholders[parameter.dtype] = torch.empty(1, dtype=parameter.dtype, device=device)
        return empty.expand(parameter.shape)

    def enter(self, number: int) -> None:
        """Layer `number` computes next. When this returns, its weights are on the device, of others only the next's."""
        if not self._enabled:
            return
        if self._transfers is None:  # called outside of a step
            self.take_over()
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward:
            self._leave_at_end()
        following = number - 1 if in_backward else number + 1
        for other in self._begun.keys() - {number, following}:
            self._leave(other)
        self._bring(number)
        for begun in self._begun[number]:
            assert self._transfers is not None
            self._transfers.wait(begun)
        self._begun[number] = []
        for slot in self._layers[number]:
            assert slot.taken is not None
            assert slot.present is not None
            slot.taken.data = slot.present
        if 0 <= following < len(self._layers):
            self._bring(following)
        self.most_layers = max(self.most_layers, len(self._begun))

    def _bring(self, number: int) -> None:
        """Begin to copy a layer's weights to the device, unless they are there."""
        if number in self._begun:
            return
        assert self._transfers is not None
        self._begun[number] = []
        for slot in self._layers[number]:
            assert slot.host is not None
            with torch.no_grad(), allocations_as("parameters"):
                slot.present = torch.empty_like(slot.host, device=self._device)
                self._begun[number].append(self._transfers.begin(slot.present, slot.host))
            self._of_storage[slot.present.untyped_storage()._cdata] = slot
            self.moved_bytes += slot.present.nbytes

    def _leave(self, number: int) -> None:
        assert self._transfers is not None
        for begun in self._begun.pop(number):
            self._transfers.wait(begun)
        for slot in self._layers[number]:
            assert slot.present is not None
            del self._of_storage[slot.present.untyped_storage()._cdata]
            assert slot.taken is not None
            slot.taken.data = self._placeholder(slot.taken, self._device)
            slot.present = None

    def _leave_at_end(self) -> None:
        """When the backward pass that runs now has ended, no weight stays on the device."""
        if self._leaving:
            return
        self._leaving = True
        # As torch's own DistributedDataParallel and FSDP do. It belongs to the pass that asks first: not to one that an
        # autograd function runs inside of it.
        torch.autograd.Variable._execution_engine.queue_callback(self._all_leave)

    def _all_leave(self) -> None:
        self._leaving = False
        for number in list(self._begun):
            self._leave(number)

    def hold(self, tensor: Tensor) -> Held | None:
        """A weight on the device, or a view of one such as its transpose, is kept as a note of where it is."""
        slot = self._of_storage.get(tensor.untyped_storage()._cdata)
        if slot is None:
            return None
        return partial(self._view, slot, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _view(self, slot: Slot, size: torch.Size, stride: tuple[int, ...], offset: int, dtype: torch.dtype) -> Tensor:
        self.enter(slot.layer)
        assert slot.present is not None
        return slot.present.view(dtype).as_strided(size, stride, offset)

    @contextmanager
    def all_on_device(self) -> Iterator[None]:
        """Within it, all weights are on the device as if there were no such lever."""
        self._all_leave()
        self._enabled = False
        for slot in self.slots:
            if slot.taken is not None:
                assert slot.host is not None
                slot.taken.data = slot.host.to(self._device)
        try:
            yield
        finally:
            for slot in self.slots:
                if slot.taken is not None:
                    slot.taken.data = self._placeholder(slot.taken, self._device)
            self._enabled = True


class Slot:
    """The place of one frozen weight: parameter `name` of `module`, in layer number `layer`.

    taken: the parameter whose data are in `host`. Another tensor may be put into its place: for good, as a trace does
        (prediction/trace.py), or for a call, as torch.func.functional_call does.
    present: the weight on the device, while it is there.
    """

    def __init__(self, module: nn.Module, name: str, layer: int) -> None:
        self.module, self.name, self.layer = module, name, layer
        self.taken: Tensor | None = None
        self.host: Tensor | None = None
        self.present: Tensor | None = None

    @property
    def parameter(self) -> Tensor:
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter


def _enter(weights: HostWeights, number: int, module: nn.Module, args: Any) -> None:
    weights.enter(number)


def _moved_without(
    module: nn.Module, names: list[str], function: Callable[[Tensor], Tensor], recurse: bool = True
) -> Any:
    """`nn.Module._apply`, by which `to(device)` moves a module, without its frozen weights: all of them together may
    not fit the device."""
    order = list(module._parameters)
    kept = {name: module._parameters.pop(name) for name in names}
    try:
        type(module)._apply(module, function, recurse)
    finally:
        parameters = module._parameters | kept
        module._parameters.clear()
        module._parameters.update({name: parameters[name] for name in order})
    return module
