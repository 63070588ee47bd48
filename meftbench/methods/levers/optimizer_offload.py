"""`+optimizer_offload` (a lever): optimizer states are held in host memory, and weights are updated there.

As in ZeRO-Offload (Ren et al. 2021) and torchao's CPUOffloadOptimizer, which needs CUDA: a step copies each gradient to
the host, lets the optimizer update a copy of the weights there, and copies these back. On the device nothing of the
optimizer is left, neither states nor the temporaries of its step.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import BuildOptimizer, Lever, LeverNumber, WatchedStep
from meftbench.methods.levers.transfers import WITHOUT_MEMORY, allocations_as, moved


class OffloadedOptimizer(Optimizer):
    """An optimizer of copies of the parameters in host memory, pinned where the device has a memory of its own.

    inner: the optimizer of the copies; its states are host memory.  A schedule changes `param_groups` of this one, and
    a step gives them to `inner`. A parameter that something else has written to since the last step is copied again;
    writes through `.data` are not seen.
    """

    def __init__(self, parameters: list[nn.Parameter], build: BuildOptimizer) -> None:
        super().__init__(parameters, {})
        with allocations_as("host"):
            self._copies = {parameter: _copied(parameter) for parameter in parameters}
            self.inner = build(list(self._copies.values()))
        self._versions = {parameter: parameter._version for parameter in parameters}
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: value for name, value in inner.items() if name != "params"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        updated = {parameter: copy for parameter, copy in self._copies.items() if parameter.grad is not None}
        with allocations_as("host"):
            for parameter, copy in updated.items():
                assert parameter.grad is not None
                with moved():
                    if parameter._version != self._versions[parameter]:
                        copy.copy_(parameter)
                    copy.grad = _to_host(parameter.grad)
            for device in {parameter.device for parameter in updated if parameter.device.type not in WITHOUT_MEMORY}:
                torch.accelerator.current_stream(device).synchronize()
            self.inner.step()
            self.inner.zero_grad(set_to_none=True)
        for parameter, copy in updated.items():
            with moved():
                parameter.copy_(copy, non_blocking=True)
            self._versions[parameter] = parameter._version


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(_to_host(parameter.detach()))
    vars(copy).update(vars(parameter))  # what an optimizer reads from a parameter's attributes
    return copy


def _to_host(tensor: Tensor) -> Tensor:
    """A copy of `tensor` in host memory, perhaps still on its way."""
    if tensor.device.type in WITHOUT_MEMORY:
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.size(), dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class OptimizerOffload(Lever):
    """The optimizer's states, and a copy of the trained weights, are held in host memory."""

    acts_in_training_step = True

    def __init__(self) -> None:
        self._optimizers: weakref.WeakSet[OffloadedOptimizer] = weakref.WeakSet()

    def apply(self, applied: Applied) -> None:
        """Nothing is put into the model: the lever makes the optimizer."""

    def without(self) -> AbstractContextManager[object]:
        return nullcontext()  # it changes neither forward nor backward

    def optimizer_of(self, build: BuildOptimizer) -> BuildOptimizer:
        def build_offloaded(parameters: list[nn.Parameter]) -> Optimizer:
            optimizer = OffloadedOptimizer(parameters, build)
            self._optimizers.add(optimizer)
            return optimizer

        return build_offloaded

    def missing(self, seen: WatchedStep) -> str | None:
        return None if self._state_bytes else "no optimizer state is held in host memory"

    def numbers(self) -> dict[str, LeverNumber]:
        return {"optimizer_host_bytes": LeverNumber(self._state_bytes, "counted")}

    @property
    def _state_bytes(self) -> int:
        states = (state for optimizer in self._optimizers for state in optimizer.inner.state.values())
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
