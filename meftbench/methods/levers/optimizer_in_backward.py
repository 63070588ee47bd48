"""`+optimizer_in_backward` (a lever): an optimizer takes each gradient as soon as backward has made it, and frees it.

Then the gradients of all weights are never alive together, which in full fine-tuning are as many bytes as the weights.
Each parameter has an optimizer of its own, called by torch's `register_post_accumulate_grad_hook`, which runs when all
parts of a gradient have arrived: also where two layers share a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from meftbench.errors import UserError
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import BuildOptimizer, Lever, WatchedStep, held_at

# True while an optimizer steps in backward, of which a counter knows by the phase of a step otherwise.
stepping: ContextVar[bool] = ContextVar("stepping", default=False)


class OptimizerPerParameter(Optimizer):
    """One optimizer for each parameter.

    by_parameter: the optimizers; `param_groups` are theirs, so that a schedule of the learning rate reaches them.
    left: how many gradients the last `step` found: those that were not taken in backward.
    """

    def __init__(self, by_parameter: dict[nn.Parameter, Optimizer]) -> None:
        super().__init__(list(by_parameter), {})
        self.by_parameter, self.left = by_parameter, 0
        self.param_groups = [group for optimizer in by_parameter.values() for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step for the parameters that have a gradient still."""
        unmoved = [parameter for parameter in self.by_parameter if parameter.grad is not None]
        self.left = len(unmoved)
        for parameter in unmoved:
            self.by_parameter[parameter].step()


class OptimizerInBackward(Lever):
    """Each gradient is consumed as it is born.

    A reversible stack returns all its gradients together, at its end: under MEFT those of adapters do not profit.
    """

    acts_in_training_step = True

    def __init__(self) -> None:
        self._on = True
        self._optimizer: OptimizerPerParameter | None = None
        self._consumed: set[nn.Parameter] = set()

    def apply(self, applied: Applied) -> None:
        """Nothing is put into the model: the lever makes the optimizer, and acts in the training step."""

    def without(self) -> AbstractContextManager[object]:
        return held_at(self, "_on", False)

    def optimizer_of(self, build: BuildOptimizer) -> BuildOptimizer:
        def build_for_each(parameters: list[nn.Parameter]) -> Optimizer:
            self._optimizer = OptimizerPerParameter({parameter: build([parameter]) for parameter in parameters})
            return self._optimizer

        return build_for_each

    @contextmanager
    def in_training_step(self) -> Iterator[None]:
        self._consumed.clear()
        parameters = self._optimizer.by_parameter if self._on and self._optimizer else ()
        hooks = [parameter.register_post_accumulate_grad_hook(self._consume) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _consume(self, parameter: Tensor) -> None:
        """The hook of a parameter whose gradient is complete. Raises UserError: it had one before in this step, as with
        several micro-batches, or where a part of the model calls backward itself."""
        assert isinstance(parameter, nn.Parameter)
        assert self._optimizer is not None
        if parameter in self._consumed:
            what = f"a parameter of shape {tuple(parameter.shape)} gets its gradient in several parts"
            raise UserError("optimizer_in_backward", what, "leave the lever out")
        token = stepping.set(True)
        try:
            self._optimizer.by_parameter[parameter].step()
        finally:
            stepping.reset(token)
        parameter.grad = None
        self._consumed.add(parameter)

    def missing(self, seen: WatchedStep) -> str | None:
        left = self._optimizer.left if self._optimizer else 0
        if left:
            return f"{left} gradients were left to the optimizer's step"
        return None if self._consumed else "no gradient was taken in backward"
