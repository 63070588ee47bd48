"""Did what was asked for happen? Observed on one step, after training has begun (DESIGN 4, MEASURING 2, want 8)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import nn

from meftbench.backbones.own import transformers_part
from meftbench.errors import CellFailure
from meftbench.methods.levers import Offload
from meftbench.plan.cell import Cell
from meftbench.probes.ran_again import Runs, watched
from meftbench.records.record import Metric
from meftbench.step import Step, broken_loss, is_own


def check_levers(step: Step, cell: Cell) -> dict[str, Metric]:
    """What one forward and backward shows of the cell's levers; gradients are left cleared.

    To be called when the optimizer has stepped at least once: before, LoRA's first factor has no gradient.
    Raises CellFailure (error: lever-not-engaged) where the step contradicts the cell.
    """
    calls: Counter[str] = Counter()
    rows = [0]  # of logits, a call of the head each; its calls say nothing of layers where the loss is in chunks
    part: Any = transformers_part(step.model)
    head: Any = part.get_output_embeddings() if cell.levers.chunked_loss else None
    hooks = [
        module.register_forward_pre_hook(lambda *_: calls.update([step.phase]))
        for module in step.model.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if head is not None:
        hooks.append(head.register_forward_hook(lambda _, args, logits: rows.append(logits.shape[:-1].numel())))
    offload: Any = step.applied.around_forward
    if isinstance(offload, Offload):
        offload.reset()
    tiles_before = step.applied.tiling.recomputed if step.applied.tiling else 0
    try:
        with watched(step) as runs:
            loss = float(step.forward_backward())
    finally:
        for hook in hooks:
            hook.remove()
    ratio = (calls["forward"] + calls["backward"]) / calls["forward"] if calls["forward"] else 1.0
    moved = offload.moved_bytes if isinstance(offload, Offload) else 0
    zero, collapsed = _check_gradients(step, own=is_own(cell))
    collapsed = collapsed or broken_loss(loss)
    step.optimizer.zero_grad(set_to_none=True)
    _check_checkpoints(cell, runs)
    if step.applied.recomputes and calls["backward"] == 0 and not _kept_whole(step):
        raise _not_engaged(cell.method, "no layer ran again in backward")
    if not step.applied.recomputes and calls["backward"]:
        raise _not_engaged("checkpoint", f"{calls['backward']} layers ran again in backward although it is off")
    if cell.levers.tiled_mlp:
        _check_tiles(step, runs, tiles_before)
    labels = step.batch.get("labels", torch.empty(0))[: step.micro_batch_size].numel()
    if cell.levers.chunked_loss and max(rows) >= labels > 1:
        raise _not_engaged("chunked_loss", f"the head gave {max(rows)} rows of logits at once")
    compiled: dict[str, Metric] = {}
    if cell.levers.compile:
        found = torch._dynamo.utils.counters
        if not found["stats"]["unique_graphs"]:
            raise _not_engaged("compile", "nothing was compiled")
        compiled = {
            "compiled_graphs": Metric(found["stats"]["unique_graphs"], "measured"),
            "graph_breaks": Metric(sum(found["graph_break"].values()), "measured"),
        }
    if cell.levers.offload and moved == 0:
        raise _not_engaged("offload", "no byte was moved to the host")
    return {
        "forward_calls_ratio": Metric(ratio, "measured"),
        "offloaded_bytes": Metric(moved, "counted"),
        "zero_grad_tensors": Metric(zero, "measured"),
        **compiled,
        **({"collapse": Metric(collapsed, "measured")} if collapsed else {}),
    }


def _kept_whole(step: Step) -> bool:
    """Whether backward has nothing to run again: the graph of a stack's last block is kept, and there is no other."""
    stacks = step.applied.stacks
    kept = all(it.keeps_graph(1) and it.tiles in (1, "auto") and len(it.blocks) == 1 for it in stacks)
    return bool(stacks) and step.applied.tiling is None and kept


def _check_checkpoints(cell: Cell, runs: Runs) -> None:
    """Checkpointed layers run again from their beginning, others not; tiles of a feed-forward are no evidence."""
    if not cell.levers.checkpoint:
        again = [layer.name for layer in runs.ordinary if layer.again]
        if again:
            raise _not_engaged("checkpoint", f"{again[0]} ran again in backward although it is off")
        return
    layers = [layer for layer in [*runs.ordinary, *runs.blocks] if layer.wanted]
    missing = [layer.name for layer in layers if not layer.again]
    if not layers or len(missing) == len(layers):
        raise _not_engaged("checkpoint", "no layer ran again in backward")
    if missing:
        raise _not_engaged(
            "checkpoint", f"{missing[0]} did not run again in backward ({len(missing)} of {len(layers)})"
        )


def _check_tiles(step: Step, runs: Runs, before: int) -> None:
    """Feed-forwards of ordinary layers run again in more than one tile each, and stacks take more than one."""
    applied = step.applied
    whole = [stack for stack in applied.stacks if stack.tiles == 1]
    layers = sum(layer.wanted for layer in runs.ordinary)
    ran = applied.tiling.recomputed - before if applied.tiling else 0
    if whole or not (layers or applied.stacks) or ran < layers:
        raise _not_engaged("tiled_mlp", f"{ran} tiles ran again in backward, for {layers} layers")


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
        true = _ordinary_sizes(step)
        size_of_true = max(true.values(), default=0.0)
        unused = {n for n in (*absent, *unexplained) if size_of_true and true.get(n, 0.0) <= DEAD * size_of_true}
        absent, unexplained = ([n for n in names if n not in unused] for names in (absent, unexplained))
        explained |= unused & sizes.keys()
    if absent:
        raise _not_engaged("training", f"{absent[0]} is trained and got no gradient")
    if (unexplained or unusable) and _recomputed_in_floating_point(step):
        true = _ordinary_sizes(step)
        size_of_true = max(true.values(), default=0.0)
        dead = [name for name in unexplained if true.get(name, 0.0) <= DEAD * size_of_true]
        if not dead and all(map(math.isfinite, true.values())):
            zero = [name for name in unexplained if sizes[name] <= DEAD * size_of_true]
            lost = [f"not finite in {len(unusable)}"] if unusable else []
            lost += [f"zero in {len(zero)}"] if zero else []
            what = f"gradients are {' and '.join(lost)} of {len(sizes)} trained tensors" if lost else ""
            if largest > 10 * size_of_true:
                wild = f"up to {largest / size_of_true:.0e} times those of ordinary autograd"
                what = f"{what}, {wild}" if what else f"gradients are {wild}"
            return 0, f"recomputing activations in floating point broke down: {what}"
    if unexplained:
        what = f"the gradient of {unexplained[0]} is all zero ({len(unexplained)} such tensors)"
        raise _not_engaged("training", what)
    return sum(sizes[name] <= TRULY_ZERO * largest for name in explained), None


def _recomputed_in_floating_point(step: Step) -> bool:
    stacks = step.applied.stacks
    return any(not stack.arithmetic.exact and stack.activations == "reverse" for stack in stacks)


def _ordinary_sizes(step: Step) -> dict[str, float]:
    """Root mean squares of the gradients under ordinary autograd through the same equations."""
    step.optimizer.zero_grad(set_to_none=True)
    with step.applied.ordinary():
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
