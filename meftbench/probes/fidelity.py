"""Whether the backward pass recomputes what forward computed, and gradients are right (docs/design.md 2, 3, 6)."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meftbench.backbones import base_of
from meftbench.errors import CellFailure
from meftbench.measuring.build import build_step
from meftbench.measuring.step import OwnStep, Step
from meftbench.methods.applied import predicts_tokens
from meftbench.plan.cell import Cell, Levers
from meftbench.probes.subject import Subject
from meftbench.records.record import Metric
from meftbench.reversible import ReversibleStack, StreamError

START_LOSSES = ("pretrained_loss", "starting_loss")


def probe(subject: Subject) -> dict[str, Metric]:
    """Fidelity metrics of the cell."""
    start = measure_start(subject.cell, subject.step, subject.protocol.padding)
    return measure_fidelity(subject.step) | start


@dataclass
class StreamErrors:
    """Observer of a ReversibleStack: compares the true streams of the forward pass with the recomputed ones.

    stack: whose streams are observed; its arithmetic says what 1 in a stream of integers stands for.
    relative: per block, [first stream, second stream]: ‖recomputed − true‖ / ‖true‖, in float64.
    largest: the largest absolute difference.  mismatched: elements that are not restored bit for bit.
    nonfinite: NaN and infinite elements in recomputed streams.
    """

    stack: ReversibleStack
    true: dict[int, list[Tensor]] = field(default_factory=dict)
    relative: dict[int, list[float]] = field(default_factory=dict)
    largest: float = 0.0
    mismatched: int = 0
    nonfinite: int = 0

    def __call__(self, direction: str, block: int, streams: list[Tensor]) -> None:
        if direction == "forward":
            self.true[block] = [stream.detach().clone() for stream in streams]
            return
        errors, unit = [], self.stack.arithmetic.unit(streams[0].device)
        for recomputed, true in zip(streams, self.true.pop(block), strict=True):
            difference = (recomputed.double() - true.double()) * unit
            errors.append(_ratio(float(difference.norm()), float((true.double() * unit).norm())))
            absolute = float(difference.abs().max())
            self.mismatched += int((recomputed != true).sum())
            self.largest = absolute if math.isnan(absolute) else max(self.largest, absolute)
            self.nonfinite += int((~torch.isfinite(recomputed)).sum())
        self.relative[block] = errors


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0 else error / size if size else math.inf


def starting_point_shift(h_BLD: Tensor, reference_BLD: Tensor) -> float:
    """How far an untrained method moves the model: ‖h − h₀‖ / ‖h₀‖, in float64. 0.0: not at all.

    h_BLD, reference_BLD: last hidden states (B, L, D).
    Unlike a task score before training, this measures the representation itself.

    Raises ValueError if the shapes differ or the reference is all zero.
    Source: docs/design.md 2.
    """
    if h_BLD.shape != reference_BLD.shape:
        raise ValueError(f"shapes (B, L, D) differ: {tuple(h_BLD.shape)} and {tuple(reference_BLD.shape)}")
    size = float(reference_BLD.double().norm())
    if size == 0:
        raise ValueError("the reference is all zero")
    return float((h_BLD.double() - reference_BLD.double()).norm()) / size


def last_hidden_state(step: Step) -> Tensor:
    """The base model's output (B, L, D) for the step's batch, in evaluation mode, without gradients."""
    base = base_of(_without_peft(step.model))
    inputs = {name: value for name, value in step.whole().items() if name != "labels"}
    if isinstance(step, OwnStep):  # the user's own batch may hold what only the head takes
        accepted = inspect.signature(base.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in accepted}
    with step.applied.without_gradients(), step.autocast_region():
        hidden: Tensor = base(**inputs).last_hidden_state
    return hidden


def untrained_loss(step: Step) -> float:
    """Loss of the step's batch in evaluation mode, without gradients, one micro-batch at a time as in training.

    Under `+chunked_loss` the complete logits, which may not fit the device, are never in memory here either.
    """
    with step.applied.without_gradients():
        return step.loss()


def _without_peft(model: Any) -> nn.Module:
    """The model itself, without the wrapper that peft puts around it."""
    inner: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return inner


def measure_start(cell: Cell, step: Step, padding: float) -> dict[str, Metric]:
    """Where the cell's method starts, on the cell's batch, compared with the pre-trained model: its hidden states with
    adapters at zero; and, for a pre-trained head that predicts tokens, the loss with adapters as they are initialised.

    step: that of the cell, which other passes may have trained; both models are built afresh.
    """
    losses: dict[str, float] = {}
    if not isinstance(_without_peft(step.model), PreTrainedModel):
        reason = "what a module of one's own holds between its layers and its loss is not known"
        return {name: Metric(None, "measured", absent=reason) for name in (*START_LOSSES, "starting_point_shift")}
    whole = cell.settings().whole  # then there are no adapters
    if whole and not predicts_tokens(_without_peft(step.model)):
        return {"starting_point_shift": Metric(0.0, "measured")} | _no_losses()
    levers = Levers.of(name for name, lever in step.applied.levers.items() if lever.on_reference_model)
    plain = cell.model_copy(update={"method": "full", "method_params": {}, "levers": levers})
    pretrained = build_step(plain, step.device, padding)
    predicts = predicts_tokens(pretrained.model)
    if predicts:
        losses["pretrained_loss"] = losses["starting_loss"] = untrained_loss(pretrained)
    shift = 0.0
    if not whole:
        reference = last_hidden_state(pretrained)
        del pretrained
        untrained = build_step(cell, step.device, padding)
        if predicts:
            losses["starting_loss"] = untrained_loss(untrained)
        untrained.applied.zero_adapters()
        shift = starting_point_shift(last_hidden_state(untrained), reference)
    values = {"starting_point_shift": shift} | losses
    return {name: Metric(value, "measured") for name, value in values.items()} | ({} if predicts else _no_losses())


def _no_losses() -> dict[str, Metric]:
    reason = "the head is new: before it is trained, its loss says nothing"
    return {name: Metric(None, "measured", absent=reason) for name in START_LOSSES}


def measure_fidelity(step: Step) -> dict[str, Metric]:
    """Reconstruction error of the recomputed streams, and gradient error against reference autograd.

    Both passes draw the same random numbers; the second recomputes nothing.
    The optimizer is not stepped; gradients are left cleared. Raises CellFailure (error: stream-error) where
    streams leave the range of their arithmetic, or an exact reversal does not restore them.
    """
    applied, stacks = step.applied, step.applied.stacks
    if applied.own_optimizer or not applied.recomputes:
        reason = "there is no backward pass" if applied.own_optimizer else "nothing is recomputed in backward"
        names = ("reconstruction_rel_max", "gradient_rel_max", "gradient_cosine_min")
        return {name: Metric(None, "measured", absent=reason) for name in names}
    observers = [StreamErrors(stack) for stack in stacks]
    reversing = [stack for stack in stacks if stack.activations == "reverse"]
    strict = [stack.strict for stack in stacks]
    for stack, observer in zip(stacks, observers, strict=True):
        stack.observer = observer if stack in reversing else None
        stack.strict = stack.arithmetic.exact
    try:
        loss, gradients = _gradients(step)
    except StreamError as error:
        # The reversal that the method requires did not work: a failure of the cell, whatever the numbers.
        raise CellFailure("error", type="stream-error", message=str(error), phase=step.phase) from error
    finally:
        for stack, strict_before in zip(stacks, strict, strict=True):
            stack.observer, stack.strict = None, strict_before
    with applied.reference_autograd():
        loss_true, gradients_true = _gradients(step)
    return {
        **_reconstruction(reversing, observers),
        **_gradient_errors(gradients, gradients_true),
        "loss_abs_diff": Metric(abs(loss - loss_true), "measured"),
        "overflow_events": Metric(sum(observer.nonfinite for observer in observers), "measured"),
    }


def _reconstruction(stacks: list[ReversibleStack], observers: list[StreamErrors]) -> dict[str, Metric]:
    if not stacks:
        absent = Metric(None, "measured", absent="activations are checkpointed, not reconstructed from outputs")
        return {"reconstruction_rel_max": absent}
    relative = [observer.relative[block] for observer in observers for block in sorted(observer.relative)]
    flat = [error for errors in relative for error in errors]
    return {
        "reconstruction_rel": Metric(relative, "measured"),
        "reconstruction_rel_max": Metric(_worst(flat), "measured"),
        "reconstruction_abs_max": Metric(_worst([observer.largest for observer in observers]), "measured"),
        "mismatched_elements": Metric(sum(observer.mismatched for observer in observers), "measured"),
    }


def _gradients(step: Step) -> tuple[float, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[step.device] if step.device.type == "cuda" else []):
        torch.manual_seed(0)
        loss = float(step.forward_backward())
    parameters = step.applied.trained()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()
    }
    step.optimizer.zero_grad(set_to_none=True)
    return loss, gradients


def _gradient_errors(gradients: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, Metric]:
    relative, cosine = [], []
    for name, expected in true.items():
        gradient, expected = gradients[name].double(), expected.double()
        size, gradient_size = float(expected.norm()), float(gradient.norm())
        if size == 0 and gradient_size == 0:
            continue
        relative.append(_ratio(float((gradient - expected).norm()), size))
        product = float((gradient * expected).sum())
        cosine.append(product / (size * gradient_size) if size * gradient_size else 0.0)
    if not relative:
        absent = Metric(None, "measured", absent="every gradient is zero")
        return {"gradient_rel_max": absent, "gradient_cosine_min": absent}
    lowest = math.nan if any(math.isnan(c) for c in cosine) else min(cosine)
    return {
        "gradient_rel_max": Metric(_worst(relative), "measured"),
        "gradient_cosine_min": Metric(min(1.0, lowest) if not math.isnan(lowest) else lowest, "measured"),
    }


def _worst(values: list[float]) -> float:
    """The largest value; nan if any is nan (max would depend on the order)."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
