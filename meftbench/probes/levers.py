"""Did what was asked for happen? Observed on one step, after training has begun (docs/design.md 6)."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack

import torch
from torch import nn

from meftbench.catalogue import resolve
from meftbench.catalogue.levers import LEVERS
from meftbench.errors import CellFailure
from meftbench.measuring.build import is_own
from meftbench.measuring.step import Step, broken_loss
from meftbench.methods.levers.base import LeverNumber, WatchedStep
from meftbench.plan.cell import Cell
from meftbench.probes.ran_again import watched
from meftbench.records.record import Metric


def check_levers(step: Step, cell: Cell) -> dict[str, Metric]:
    """What one forward and backward shows of the cell's levers; gradients are left cleared.

    To be called when the optimizer has stepped at least once: before, LoRA's first factor has no gradient.
    Raises CellFailure (error: lever-not-engaged) where the step contradicts the cell.
    """
    applied = step.applied
    # One that the cell asks for and the model lacks is asked all the same: what the step shows is against it.
    levers = {name: applied.levers.get(name) or resolve(LEVERS[name].home)() for name in cell.levers.names()}
    in_pieces = {id(module) for lever in levers.values() for module in lever.called_in_pieces(applied)}
    calls: Counter[str] = Counter()
    with ExitStack() as entered:
        for module in step.model.modules():
            if isinstance(module, nn.Linear) and id(module) not in in_pieces:
                hook = module.register_forward_pre_hook(lambda *_: calls.update([step.phase]))
                entered.callback(hook.remove)
        for lever in levers.values():
            entered.enter_context(lever.watched(applied))
        runs = entered.enter_context(watched(step))
        loss = float(step.forward_backward())
    ratio = (calls["forward"] + calls["backward"]) / calls["forward"] if calls["forward"] else 1.0
    zero, collapsed = _check_gradients(step, own=is_own(cell))
    collapsed = collapsed or broken_loss(loss)
    step.optimizer.zero_grad(set_to_none=True)
    labels = step.batch.get("labels", torch.empty(0))[: step.micro_batch_size].numel()
    seen = WatchedStep(applied, runs, labels)
    for name, lever in levers.items():
        if fact := lever.missing(seen):
            raise _not_engaged(name, fact)
    again = [layer.name for layer in runs.layers if layer.again]
    if again and "checkpoint" not in levers:
        raise _not_engaged("checkpoint", f"{again[0]} ran again in backward although it is off")
    if applied.recomputes and calls["backward"] == 0 and not _kept_whole(step):
        raise _not_engaged(cell.method, "no layer ran again in backward")
    if not applied.recomputes and calls["backward"]:
        raise _not_engaged("checkpoint", f"{calls['backward']} layers ran again in backward although it is off")
    observed = {"offloaded_bytes": LeverNumber(0, "counted")}
    for lever in levers.values():
        observed |= lever.numbers()
    return {
        "forward_calls_ratio": Metric(ratio, "measured"),
        "zero_grad_tensors": Metric(zero, "measured"),
        **{name: Metric(number.value, number.source) for name, number in observed.items()},
        **({"collapse": Metric(collapsed, "measured")} if collapsed else {}),
    }


def _kept_whole(step: Step) -> bool:
    """Whether backward has nothing to run again: the graph of a stack's last block is kept, and there is no other."""
    stacks = step.applied.stacks
    kept = all(it.keeps_graph(1) and it.tiles in (1, "auto") and len(it.blocks) == 1 for it in stacks)
    return bool(stacks) and "tiled_mlp" not in step.applied.levers and kept


# A gradient whose true value is zero is exactly zero by the kernels of one processor and rounding by those of another.
# Where theory says zero, all that is small beside the largest gradient counts as zero; elsewhere only what is smaller
# than any gradient that trains, as those of a model with random weights are 1e-8 of its head's.
TRULY_ZERO, DEAD = 1e-3, 1e-12


def _check_gradients(step: Step, own: bool = False) -> tuple[int, str | None]:
    """Count of trained tensors whose gradient is zero: those whose true gradient is, by theory; and what broke down.

    An absent gradient, a zero one that no theory explains, or one on a frozen tensor, is an error. But where
    activations are recomputed in floating point, as published, gradients that are not finite or vanish though ordinary
    autograd has them are a result of that arithmetic: a sentence, not an error.
    own: a model of the user's own may have parameters that its loss does not depend on: no error where ordinary
    autograd has no gradient for them either.
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
            lost = [f"not finite in {len(unusable)}"] if unusable else []
            lost += [f"zero in {len(zero)}"] if zero else []
            what = f"gradients are {' and '.join(lost)} of {len(sizes)} trained tensors" if lost else ""
            if largest > 10 * size_of_true:
                wild = f"up to {largest / size_of_true:.0e} times those of reference autograd"
                what = f"{what}, {wild}" if what else f"gradients are {wild}"
            return 0, f"recomputing activations in floating point broke down: {what}"
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
    return {
        name: float(parameter.grad.double().square().mean().sqrt())
        for name, parameter in step.applied.trained().items()
        if parameter.grad is not None
    }


def _truly_zero(step: Step, name: str) -> bool:
    """Whether the true gradient of a tensor is zero, whatever the weights."""
    if name in step.applied.no_gradient:
        return True
    # Softmax does not see a constant added to all scores.
    if name.endswith(("key.bias", "k_proj.bias")):
        return True
    # A single key has all the attention whatever its score: queries and keys have no gradient then.
    mask = step.batch.get("attention_mask")
    one_token = mask is not None and int(mask.sum(1).max()) == 1
    return one_token and any(part in name for part in ("query", "key", "q_proj", "k_proj", "q_norm", "k_norm"))


def _not_engaged(lever: str, fact: str) -> CellFailure:
    return CellFailure("error", type="lever-not-engaged", message=f"{lever}: {fact}")
