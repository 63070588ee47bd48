"""Bytes of live tensor storages in a training step, counted exactly (docs/design.md 6)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from meftbench.backbones.quantize import statistics_of
from meftbench.measuring.optimizers import keeps_state, states_of
from meftbench.measuring.step import Mark, Step
from meftbench.probes.modules_running import ModulesRunning
from meftbench.probes.sharded_tensors import DTensor, followed
from meftbench.probes.storage_counter import BLOCK, Origin, Peak, StorageCounter


@dataclass
class Observed:
    """What the counter saw in one step, in bytes.

    saved: the largest growth from the start of the step to the start of a backward pass, without the loss.
    buffers: what was alive at the peak of forward and backward, if a step before showed how high that is.
    gradients: of trained parameters, at that peak.
    timeline: the level through the step, as of `LevelHistory.points`.
    """

    baseline: int
    saved: int
    phase_peaks: dict[str, int]
    peak: Peak
    host_peak: int
    gradients: int = 0
    buffers: list[tuple[int, str, Origin]] = field(default_factory=list)
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def activation_peak(self) -> int:
        return max(self.phase_peaks.get("forward", 0), self.phase_peaks.get("backward", 0)) - self.baseline


class CountedStep:
    """A step under a counter that knows the categories of its tensors. Use as a context manager."""

    def __init__(self, step: Step, *, block: int = BLOCK, limit: int | None = None) -> None:
        self.step = step
        self.counter = StorageCounter(step.device.type, block, limit)
        self._hooks: list[Any] = []
        self._regions = ExitStack()
        self._gathered: set[int] = set()  # ids of gathered parameters, which fully_shard keeps from step to step
        self._modules = ModulesRunning(step.model)

    def __enter__(self) -> Self:
        gc.collect()
        counter, model, owner_of = self.counter, self.step.model, self._modules.owner_of
        for lever in self.step.applied.levers.values():
            for tensor in lever.on_host():
                counter.book(tensor, "host")
        for parameter in [*model.parameters(), *statistics_of(model)]:
            counter.book(parameter, "parameters", owner_of.get(id(parameter)))
        for buffer in model.buffers():
            counter.book(buffer, "buffers", owner_of.get(id(buffer)))
        for tensor in self.step.batch.values():
            counter.book(tensor, "inputs")
        self._book_optimizer()
        for parameter in self.step.applied.trained().values():
            # A tensor that the first hook sees is added to the gradient (accumulation), or becomes it.
            # torch.autograd.grad calls this hook, too: a reversible stack sums the gradients of its tiles.
            self._hooks.append(parameter.register_hook(self.counter.arrived))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._book_gradient))
        if self.step.sharing is not None:
            self._regions.enter_context(followed(counter.resized))
            # After the hooks of fully_shard, which gather the weights.
            self._hooks += [m.register_forward_pre_hook(self._book_gathered) for m in self.step.sharing.gathering]
        counter.__enter__()  # type: ignore[no-untyped-call]
        if self.step.sharing is not None:
            self.step.sharing.begin_anew()
        return self

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)  # type: ignore[no-untyped-call]
        self._regions.close()
        for hook in self._hooks:
            hook.remove()

    def run(self) -> Observed:
        """One step, observed."""
        # Contexts of autograd functions form cycles, which gc would free at a random moment (docs/measuring.md 4).
        gc.collect()
        # Where events are kept there are no origins, and compiled layers with hooks would not be whole graphs.
        compiled = "compile" in self.step.applied.levers or any(
            m._compiled_call_impl for m in self.step.model.modules()
        )
        if self.counter.events is not None or compiled:
            return observe(self.counter, self.step.run, self._book_optimizer)
        with self._modules as self.counter.modules:
            return observe(self.counter, self.step.run, self._book_optimizer)

    def _book_gathered(self, module: nn.Module, _arguments: Any) -> None:
        """Count gathered weights as parameters, and their gradients, which live until they are shared out again."""
        for parameter in module.parameters():
            self.counter.book(parameter, "parameters")
            if parameter.requires_grad and not isinstance(parameter, DTensor) and id(parameter) not in self._gathered:
                self._gathered.add(id(parameter))
                self._hooks.append(parameter.register_hook(self.counter.arrived))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._book_gradient))

    def _book_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.counter.arrived(parameter.grad)
            self.counter.book(parameter.grad, "gradients", self._modules.owner_of.get(id(parameter)))

    def _book_optimizer(self) -> None:
        for parameter, state, place in states_of(self.step.optimizer):
            if place != "paged":
                self.counter.book(state, place, self._modules.owner_of.get(id(parameter)))


def observe(counter: StorageCounter, run: Callable[[Mark], object], at_end: Callable[[], None]) -> Observed:
    """What `counter` sees while `run` runs, which calls its argument with the name of each phase of a step.

    at_end: called when the phase "end" begins.
    """
    baseline, saved = counter.total, 0
    counter.mark("forward")
    counter.reset()

    def mark(phase: str) -> None:
        nonlocal saved
        if phase == "backward":
            # The loss is the only output that is alive; it is not saved for the backward pass.
            saved = max(saved, counter.total - baseline - counter.block)
        if phase == "end":
            at_end()
        counter.mark(phase)

    run(mark)
    counter.phase_peaks.pop("end", None)
    counter.explain_from = counter.busiest
    peaks, buffers = dict(counter.phase_peaks), counter.explained
    gradients = counter.gradients.bytes_at(counter.busiest_at)
    timeline = counter.history.points()
    return Observed(baseline, max(saved, 0), peaks, counter.peak, counter.host_peak, gradients, buffers, timeline)


def warmup_steps(step: Step, requested: int) -> int:
    """Steps before the measured ones: at least one where the optimizer keeps state, which the first step creates, and
    as many as ranks need until all steps are alike."""
    settling = 0 if step.sharing is None else step.sharing.steps_to_settle
    return max(requested, int(keeps_state(step.optimizer)), settling)
