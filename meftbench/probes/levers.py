"""Whether the memory optimisations (levers) of a cell took effect, observed on one step (docs/design.md 6)."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack

import torch
from torch import nn

from meftbench.backbones.packed import rows_read
from meftbench.errors import CellFailure
from meftbench.measuring.build import is_own
from meftbench.measuring.packing import PackedStep, packing_fault
from meftbench.measuring.step import Step, broken_loss
from meftbench.methods.levers.base import LeverNumber, WatchedStep, made_lever
from meftbench.methods.mezo import ForwardOnly
from meftbench.plan.cell import Cell
from meftbench.probes.forward_only import ForwardOnlyStep
from meftbench.probes.ran_again import watched
from meftbench.records.record import Metric


def check_levers(step: Step, cell: Cell) -> dict[str, Metric]:
    """What one forward and backward pass shows of the cell's levers; gradients are left cleared.

    A method without a backward pass takes its optimizer's step, too, which has no gradients that show what it will do.

    To be called after the first step of the optimizer: until then the gradient of LoRA's first factor is zero.
    Raises CellFailure (error: lever-not-engaged) where the step contradicts the cell.
    """
    applied = step.applied
    # A lever that the cell has and the model lacks is checked all the same: the step shows that it is missing.
    forward_only = ForwardOnlyStep(step) if isinstance(step.optimizer, ForwardOnly) else None
    levers = {
        name: applied.levers.get(name) or made_lever(cell.label, name, cell.lever_params.get(name, {}))
        for name in cell.levers.names()
    }
    in_pieces = {id(module) for lever in levers.values() for module in lever.called_in_pieces(applied)}
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for module in step.model.modules():
            if isinstance(module, nn.Linear) and id(module) not in in_pieces:
                hook = module.register_forward_pre_hook(lambda *_: calls.update([step.phase]))
                stack.callback(hook.remove)
        for lever in levers.values():
            stack.enter_context(lever.watched(applied))
        runs = stack.enter_context(watched(step))
        rows = stack.enter_context(rows_read())
        if forward_only:
            stack.enter_context(forward_only)
        loss = float(step.forward_backward())
    if forward_only is None:
        ratio = (calls["forward"] + calls["backward"]) / calls["forward"] if calls["forward"] else 1.0
        zero, collapsed = _check_gradients(step, own=is_own(cell))
    else:
        if fact := forward_only.missing():
            raise _not_engaged(cell.method, fact)
        ratio, zero, collapsed = forward_only.passes, None, None
    collapsed = collapsed or broken_loss(loss)
    step.optimizer.zero_grad(set_to_none=True)
    if isinstance(step, PackedStep) and (fact := packing_fault(step, rows)):
        raise _not_engaged("packing", fact)
    if any(lever.acts_in_training_step for lever in levers.values()):
        step.run()
    watched_step = WatchedStep(applied, runs, step.labels_at_once, backward=forward_only is None)
    for name, lever in levers.items():
        if fact := lever.missing(watched_step):
            raise _not_engaged(name, fact)
    layers_run_again = [layer.name for layer in runs.layers if layer.again]
    if layers_run_again and "checkpoint" not in levers:
        raise _not_engaged("checkpoint", f"{layers_run_again[0]} ran again in backward although it is off")
    # Levers that make layers run again look for that themselves; experts of a mixture are no `nn.Linear`.
    if applied.stacks and applied.recomputes and calls["backward"] == 0 and not _kept_whole(step):
        raise _not_engaged(cell.method, "no layer ran again in backward")
    if not applied.recomputes and calls["backward"]:
        raise _not_engaged("checkpoint", f"{calls['backward']} layers ran again in backward although it is off")
    numbers = {"offloaded_bytes": LeverNumber(0, "counted")}
    for lever in levers.values():
        numbers |= lever.numbers()
    return {
        "forward_calls_ratio": Metric(ratio, "measured"),
        "zero_grad_tensors": Metric(zero, "measured", absent="there is no backward pass" if zero is None else None),
        **{name: Metric(number.value, number.source) for name, number in numbers.items()},
        **({"collapse": Metric(collapsed, "measured")} if collapsed else {}),
    }


def _kept_whole(step: Step) -> bool:
    """Whether the backward pass has nothing to run again: each stack has one block, and the graph of that is kept."""
    stacks = step.applied.stacks
    kept = all(stack.keeps_graph(1) and stack.tiles in (1, "auto") and len(stack.blocks) == 1 for stack in stacks)
    return bool(stacks) and "tiled_mlp" not in step.applied.levers and kept


# A gradient whose true value is zero is exactly zero with the kernels of one processor and a rounding error with those
# of another. Where theory says zero, a gradient that is small beside the largest counts as zero (TRULY_ZERO); elsewhere
# only one that is too small to train (DEAD): with random weights, useful ones can be 1e-8 of the head's.
TRULY_ZERO, DEAD = 1e-3, 1e-12


def _check_gradients(step: Step, own: bool = False) -> tuple[int, str | None]:
    """Number of trained tensors whose gradient is zero, as theory says it must be; and a sentence on what broke down.

    Raises CellFailure for an absent gradient, a zero one that theory does not explain, and one on a frozen tensor. But
    where activations are recomputed in floating point, as published, gradients that are not finite, or vanish though
    reference autograd has them, are a result of that arithmetic: they give the sentence, not an error.
    own: the user's own model may have parameters that its loss does not depend on: no error where reference autograd
    has no gradient for them either.
    """
    sizes: dict[str, float] = {}  # root of the mean square of each gradient
    absent = []
    for name, parameter in step.model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            absent.append(name)
        if not parameter.requires_grad and parameter.grad is not None:
            raise _not_engaged("freezing", f"{name} is frozen and got a gradient")
        if parameter.grad is not None:
            sizes[name] = float(parameter.grad.detach().double().square().mean().sqrt())
    largest = max((size for size in sizes.values() if math.isfinite(size)), default=0.0)
    explained = {name for name in sizes if _truly_zero(step, name)}
    unexplained = [name for name, size in sizes.items() if name not in explained and size <= DEAD * largest]
    unusable = [name for name, size in sizes.items() if not math.isfinite(size)]
    if own and (absent or unexplained):
        true = _reference_sizes(step)
        size_of_true = max(true.values(), default=0.0)
        unused = {n for n in (*absent, *unexplained) if size_of_true and true.get(n, 0.0) <= DEAD * size_of_true}
        absent, unexplained = ([n for n in names if n not in unused] for names in (absent, unexplained))
        explained |= unused & sizes.keys()
    if absent:
        raise _not_engaged("training", f"{absent[0]} is trained and got no gradient")
    if (unexplained or unusable) and _recomputed_in_floating_point(step):
        true = _reference_sizes(step)
        size_of_true = max(true.values(), default=0.0)
        dead = [name for name in unexplained if true.get(name, 0.0) <= DEAD * size_of_true]
        if not dead and all(map(math.isfinite, true.values())):
            zero = [name for name in unexplained if sizes[name] <= DEAD * size_of_true]
            faults = [f"not finite in {len(unusable)}"] if unusable else []
            faults += [f"zero in {len(zero)}"] if zero else []
            what = f"gradients are {' and '.join(faults)} of {len(sizes)} trained tensors" if faults else ""
            if largest > 10 * size_of_true:
                excess = f"up to {largest / size_of_true:.0e} times those of reference autograd"
                what = f"{what}, {excess}" if what else f"gradients are {excess}"
            return 0, f"recomputing activations in floating point broke down: {what}"
    if unexplained:
        # The gradient of one factor of a product is as small as the other factor, which may have hardly left zero: LoRA
        # after a few steps of SGD. With weights that are not near zero it tells.
        moved = _sizes_at_moved_weights(step)
        unexplained = [name for name in unexplained if moved.get(name, 0.0) <= DEAD * max(moved.values(), default=0.0)]
    if unexplained:
        what = f"the gradient of {unexplained[0]} is all zero ({len(unexplained)} such tensors)"
        raise _not_engaged("training", what)
    return sum(sizes[name] <= TRULY_ZERO * largest for name in explained), None


def _recomputed_in_floating_point(step: Step) -> bool:
    stacks = step.applied.stacks
    return any(not stack.arithmetic.exact and stack.activations == "reverse" for stack in stacks)


def _reference_sizes(step: Step) -> dict[str, float]:
    """Root mean squares of the gradients under reference autograd through the same equations."""
    step.optimizer.zero_grad(set_to_none=True)
    with step.applied.reference_autograd():
        step.forward_backward()
    return _rms_of_gradients(step.applied.trained())


def _sizes_at_moved_weights(step: Step) -> dict[str, float]:
    """Root mean squares of the gradients where every trained weight is moved by a random 1 % or more of the largest in
    its tensor; the weights are afterwards what they were."""
    trained = step.applied.trained()
    kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
    generator = torch.Generator().manual_seed(0)
    step.optimizer.zero_grad(set_to_none=True)
    try:
        with torch.no_grad():
            for parameter in trained.values():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                parameter.add_(noise, alpha=0.01 * max(1.0, float(parameter.abs().max())))
        step.forward_backward()
        return _rms_of_gradients(trained)
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(kept[name])


def _rms_of_gradients(trained: dict[str, nn.Parameter]) -> dict[str, float]:
    return {
        name: float(parameter.grad.double().square().mean().sqrt())
        for name, parameter in trained.items()
        if parameter.grad is not None
    }


def _truly_zero(step: Step, name: str) -> bool:
    """Whether the true gradient of a tensor is zero, whatever the weights."""
    if name in step.applied.no_gradient:
        return True
    # A constant added to all scores does not change their softmax.
    if name.endswith(("key.bias", "k_proj.bias")):
        return True
    # A single key gets all the attention whatever its score: the gradients of queries and keys are zero then.
    return step.longest == 1 and any(part in name for part in ("query", "key", "q_proj", "k_proj", "q_norm", "k_norm"))


def _not_engaged(lever: str, fact: str) -> CellFailure:
    return CellFailure("error", type="lever-not-engaged", message=f"{lever}: {fact}")
