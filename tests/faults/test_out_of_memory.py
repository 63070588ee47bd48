"""Out of memory at every allocation in turn: the cell is `oom`, and all that goes on in the process is as before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from failing_allocations import REQUESTED, FailingAllocations
from long_profile import many_minutes, sampled
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import CellFailure
from meftbench.measuring import requests
from meftbench.measuring.build import build_step
from meftbench.measuring.optimizers import allocating_paged, states_of
from meftbench.measuring.out_of_memory import out_of_memory_as_result
from meftbench.measuring.step import PHASES, Step
from meftbench.methods.levers.transfers import allocating_as
from meftbench.plan.protocol import Protocol
from meftbench.prediction.predict import predict
from meftbench.prediction.tracer import Tracer
from meftbench.probes.memory_counted import CountedStep
from meftbench.probes.storage_counter import StorageCounter
from meftbench.worker import run_job
from models import a_cell_of

METHODS = [
    "lora+checkpoint",
    "meft1-exact",
    "meft2",
    "full+chunked_loss",
    "meft1-exact+offload",
    "lora+checkpoint+offload",
    "full+optimizer_in_backward",
    "meft1-exact+optimizer_in_backward",
]
CASES = [
    *(("bert", method) for method in METHODS if "chunked_loss" not in method),  # which needs a language model
    *(("llama", method) for method in METHODS),
]
SAMPLED = 4  # allocations of a step that fail in the usual run, evenly spread
every_case = pytest.mark.parametrize(("backbone", "method"), CASES)


def a_tiny_cell(backbone: str, method: str) -> Any:
    head = "causal_lm" if backbone == "llama" else None
    return a_cell_of(backbone, method, layers=2, batch_size=2, sequence_length=8, head=head)


@dataclass
class Restored:
    """A training step that has run once, and can be run again from the same weights, optimizer state and seed."""

    step: Step
    before: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step.run()  # the first step makes the optimizer's state
        self.before = [tensor.detach().clone() for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        model = self.step.model
        return [*model.parameters(), *model.buffers(), *(state for _, state, _ in states_of(self.step.optimizer))]

    def restore(self) -> None:
        """As who catches the error of a failed step would: without its gradients."""
        self.step.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in zip(self.tensors(), self.before, strict=True):
                tensor.copy_(value)
        torch.manual_seed(3)

    def gradients(self) -> list[Tensor]:
        """The loss and all gradients."""
        self.restore()
        loss = self.step.forward_backward()
        grads = [parameter.grad for parameter in self.step.applied.trained().values()]
        return [loss, *(grad.clone() for grad in grads if grad is not None)]

    def after_a_step(self) -> list[Tensor]:
        """The loss, weights and optimizer state after a whole step."""
        self.restore()
        loss = self.step.run()
        return [torch.tensor(loss), *(tensor.detach().clone() for tensor in self.tensors())]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def left_behind(step: Step) -> dict[str, Any]:
    """What contexts, hooks and patched functions change: of torch, and of each module and parameter of the model."""
    found: dict[str, Any] = {
        "modes": len(_get_current_dispatch_mode_stack()),
        "gradients are recorded": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "hooks of all modules": (len(hooks_of_all._global_forward_hooks), len(hooks_of_all._global_forward_pre_hooks)),
        "hooks of saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True),  # type: ignore[call-arg]
        "allocations": (allocating_as.get(), allocating_paged.get()),
    }
    for name, module in step.model.named_modules():
        found[name] = len(module._forward_hooks), len(module._forward_pre_hooks), module.training, sorted(vars(module))
    for name, parameter in step.model.named_parameters():
        of_gradient = getattr(parameter, "_post_accumulate_grad_hooks", None)
        found[f"{name} itself"] = len(parameter._backward_hooks or ()), len(of_gradient or ()), parameter.requires_grad
    return found


def observed_step(step: Step) -> Any:
    """What a counter sees in a step, and what is alive after it."""
    with CountedStep(step) as counted:
        seen = counted.run()
    return seen.baseline, seen.saved, seen.activation_peak, seen.host_peak, counted.counter.live


def failure_of(step: Step, number: int, run: Callable[[Step], Any], error: str) -> CellFailure:
    """How a step ends of which this allocation fails."""
    with (
        pytest.raises(CellFailure) as failure,
        FailingAllocations(number, error),
        out_of_memory_as_result(lambda: step.phase),
    ):
        run(step)
    return failure.value


def fails_and_is_unharmed(backbone: str, method: str, numbers: Callable[[int], Iterable[int]]) -> set[str]:
    """Allocations of a step fail in turn, of a step that a counter watches, too. The phases in which they failed.

    numbers: those that fail, of so many.
    """
    whole = Restored(build_step(a_tiny_cell(backbone, method), torch.device("cpu")))
    step, gradients, after, phases = whole.step, whole.gradients(), whole.after_a_step(), set()
    around = left_behind(step)
    whole.restore()
    with FailingAllocations() as allocations:
        step.run()
    for number in numbers(allocations.count):
        for run in (Step.run, observed_step):
            whole.restore()
            failure = failure_of(step, number, run, error=("cuda", "cpu")[number % 2])
            assert ("oom", REQUESTED) == (failure.status, failure.detail["requested_bytes"])
            phases.add(failure.detail["phase"])
            assert around == left_behind(step)
            assert same(whole.gradients(), gradients), (number, run)
            assert same(whole.after_a_step(), after), (number, run)
            assert around == left_behind(step)
    return phases


@pytest.mark.parametrize(("backbone", "method"), sampled(CASES, 3))
def test_a_step_without_memory_at_any_moment_leaves_nothing_behind(backbone, method):
    """The same step then gives the same gradients and the same weights, bit for bit."""
    phases = fails_and_is_unharmed(backbone, method, lambda count: range(0, count, count // SAMPLED))

    assert {"forward", "backward"} <= phases


@many_minutes
@every_case
def test_a_step_without_memory_at_every_moment_leaves_nothing_behind(backbone, method):
    phases = fails_and_is_unharmed(backbone, method, range)

    # What takes gradients in backward has nothing left to do afterwards.
    assert ({*PHASES} - {"optimizer"} if "optimizer_in_backward" in method else {*PHASES}) == phases


@every_case
def test_memory_is_counted_as_before_after_a_step_that_failed(backbone, method):
    """No byte of the failed step is held."""
    whole = Restored(build_step(a_tiny_cell(backbone, method), torch.device("cpu")))

    whole.restore()
    before = observed_step(whole.step)
    with FailingAllocations() as allocations:
        whole.step.run()
    for number in random.Random(backbone + method).sample(range(allocations.count), 2):
        whole.restore()
        with pytest.raises(RuntimeError), FailingAllocations(number):
            whole.step.run()
    whole.restore()

    assert before == observed_step(whole.step)


PROTOCOL = Protocol(warmup=1, steps=1, repeats=1)


def result_of(cell: Any, number: int | None, error: str = "cuda") -> tuple[dict[str, Any], FailingAllocations]:
    """The result file of a cell of which an allocation fails: while it is built, or in any of its passes."""
    request = {"cell": cell.model_dump(mode="json"), "protocol": PROTOCOL.model_dump(mode="json")}
    with FailingAllocations(number, error) as allocations:
        content = run_job(requests, "measure", json.loads(json.dumps(request)), lambda line: None)
    json.dumps(content, allow_nan=False)
    return content, allocations


def fails_as_result(backbone: str, method: str, times: int) -> None:
    cell = a_tiny_cell(backbone, method)
    result_of(cell, None)  # the first cell of a process fills caches, so that it allocates more often than the next
    whole, allocations = result_of(cell, None)
    assert "ok" == whole["status"], whole
    chance = random.Random(f"{backbone} {method}")
    for number in chance.sample(range(allocations.count), times):
        error = chance.choice(("cuda", "cpu", "python"))
        content, attempted = result_of(cell, number, error)
        assert attempted.failed, (number, allocations.count, attempted.count)
        assert "oom" == content["status"], (number, content)
        assert content["status_detail"].get("requested_bytes") == (None if error == "python" else REQUESTED)
        assert content["status_detail"]["phase"] in ("load", *PHASES, "end"), content
    again, _ = result_of(cell, None)
    counted = [name for name, metric in whole["answer"]["metrics"].items() if metric["source"] == "counted"]
    assert len(counted) > 10
    for name in counted:
        assert whole["answer"]["metrics"][name] == again["answer"]["metrics"][name], name


@pytest.mark.parametrize(("backbone", "method"), [("bert", "meft1-exact+offload"), ("llama", "lora+checkpoint")])
def test_a_cell_without_memory_at_any_moment_is_out_of_memory(backbone, method):
    """Never an error. Another cell in the same process is counted as before."""
    fails_as_result(backbone, method, times=6)


@many_minutes
@every_case
def test_a_cell_without_memory_at_many_moments_is_out_of_memory(backbone, method):
    fails_as_result(backbone, method, times=60)


def test_a_prediction_that_failed_does_not_change_the_next_ones(monkeypatch):
    """Of the same search, which keeps traces: whatever the moment."""
    cell = a_cell_of("bert", "meft1-exact", device="predicted:h100")
    profile, counted = find_profile("h100"), Countdown()
    real = StorageCounter.gain
    monkeypatch.setattr(StorageCounter, "gain", lambda *arguments: counted.next() or real(*arguments))
    expected = predict(cell, profile, tracer=Tracer(profile)).replayed
    total, tracer = -counted.left, Tracer(profile)
    assert total > 100

    for counted.left in (1, total // 5, total // 3, total // 2):
        with pytest.raises(MemoryError):
            predict(cell, profile, tracer=tracer)

    counted.left = 0
    assert expected == predict(cell, profile, tracer=tracer).replayed


@dataclass
class Countdown:
    """Raises MemoryError at the call at which nothing is left."""

    left: int = 0

    def next(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError
