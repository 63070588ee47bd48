"""A step traced with tensors that have shapes and no values: the storage counter sees every allocation, nothing is run.

What it counts is the CPU step, byte for byte (tests/prediction/test_trace.py), in seconds and without the memory: 48
layers, or 65,536 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meftbench.plan.cell import Cell
from meftbench.probes.memory_counted import CountedStep, Observed
from meftbench.step import Mark, Step, build_optimizer, build_step


def count_uncomputed(cell: Cell, warmup: int = 1) -> Observed:
    """A step of `cell` on the CPU after `warmup` others, traced; no sequence has padding.

    Without warm-up there is no optimizer state yet, which activation memory does not contain.

    Raises UserError where the cell cannot be built, as `build_step` does.
    """
    built = build_step(cell, torch.device("cpu"))
    mode = FakeTensorMode()
    step = _Uncomputed(**vars(built))
    for module in step.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    step.batch = {name: mode.from_tensor(tensor) for name, tensor in step.batch.items()}
    step.optimizer = build_optimizer(cell, list(step.applied.trained().values()))
    with mode, CountedStep(step) as counted:
        for _ in range(warmup):
            counted.run()
        return counted.run()


class _Uncomputed(Step):
    def run(self, mark: Mark = lambda phase: None) -> float:
        loss = self.forward_backward(mark)
        self._enter("optimizer", mark)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", mark)
        del loss
        return 0.0  # it has no value

    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        # transformers drops a mask of ones after a look at its values, which are not there to be looked at.
        return {name: t for name, t in super()._samples(start, stop).items() if name != "attention_mask"}
