"""Time of a step from what it does (`Work`) and what a device does in a second (`Speeds`): a roofline.

    an operator:   max(flops / rate, bytes / bandwidth), or their sum where a processor waits for memory
    a GPU:         max(Σ operators, Σ launches), as kernels are started while others run
    a CPU:         Σ operators + Σ launches

Source of the first: Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from meftbench.catalogue.operations import Operation, Operator, Work
from meftbench.catalogue.speeds import Rate, Speeds

_ATTENTION = ("attention", "attention backward")
_PRODUCTS = ("matrix", "fused product", *_ATTENTION)
PARTS = ("matrix", "attention", "memory", "optimizer", "launches", "transfers")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on: `PARTS`, which add up to `step_s`.

    matrix, attention: products of matrices, and fused attention.  memory: operators that only move bytes. (All three of
    forward and backward.)  optimizer: its step.  launches: to start kernels; on a GPU what is beyond the time that they
    run.  transfers: to and from host memory, beyond the time that the device computes meanwhile.
    recomputed_s: of matrix, attention and memory what runs again in the backward pass.
    """

    parts: dict[str, float]
    recomputed_s: float

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())


def missing_rate(work: Work, speeds: Speeds) -> str | None:
    """The dtype of a product for which no rate is known; None: all are known."""
    dtypes = {each.operator.dtype for each in work.counts if each.operator.kind in _PRODUCTS}
    return next(iter(sorted(dtypes - speeds.matrix.keys())), None)


def step_time(work: Work, speeds: Speeds) -> StepTime:
    """The predicted time of a step.

    Transfers of the forward and the backward pass run beside computation, those of the optimizer's step do not.
    Raises KeyError: there is no rate for a dtype (see `missing_rate`).
    """
    parts = dict.fromkeys(PARTS, 0.0)
    computed: dict[str, float] = defaultdict(float)  # by phase
    transferred: dict[str, float] = defaultdict(float)
    recomputed = 0.0
    for operation, times in work.counts.items():
        operator, phase = operation.operator, operation.phase
        taken = times * _seconds(operation, speeds)
        if operation.place == "moved" and speeds.link_bytes_per_s is not None:
            transferred[phase] += taken
            continue
        computed[phase] += taken
        parts["optimizer" if phase == "optimizer" else _part(operator)] += taken
        recomputed += taken if operation.recomputed else 0.0
    launches = work.launches * speeds.launch_s
    parts["launches"] = max(0.0, launches - sum(computed.values())) if speeds.asynchronous else launches
    beside = max(0.0, _beside(transferred) - _beside(computed) - parts["launches"])
    parts["transfers"] = beside + transferred["optimizer"]
    return StepTime(parts, recomputed)


def _beside(by_phase: dict[str, float]) -> float:
    return by_phase["forward"] + by_phase["backward"]


def _part(operator: Operator) -> str:
    return "attention" if operator.kind in _ATTENTION else "matrix" if operator.kind in _PRODUCTS else "memory"


def _seconds(operation: Operation, speeds: Speeds) -> float:
    operator = operation.operator
    if operation.place == "moved" and speeds.link_bytes_per_s is not None:
        return operator.written / speeds.link_bytes_per_s
    if operation.place == "host" and speeds.host_bytes_per_s is not None:
        return operator.moved / speeds.host_bytes_per_s
    if operator.kind == "fresh":
        return operator.written / speeds.fresh_bytes_per_s if speeds.fresh_bytes_per_s is not None else 0.0
    if operator.kind not in _PRODUCTS:
        return operator.moved / speeds.bandwidth(operator.kind, operator.written)
    loading = _rate(operator, speeds).loading_bytes_per_s
    if loading is not None:
        return _computing(operator, speeds) + operator.moved / loading
    moving = operator.moved / speeds.bandwidth("elementwise", operator.written)
    return max(_computing(operator, speeds), moving)


def _computing(operator: Operator, speeds: Speeds) -> float:
    """Seconds of the operations of a product."""
    rate, flops = _rate(operator, speeds), operator.flops
    if operator.kind == "matrix":
        return flops / (rate.at(operator.size[1:]) * speeds.matrix_efficiency)
    if operator.kind in _ATTENTION:
        queries, keys, head, causal = operator.size[2:]
        # Kernels leave out blocks above the diagonal, which torch counts.
        share = (1 + 1 / queries) / 2 if causal and queries == keys else 1.0
        return flops * share / (rate.at((queries, keys, head)) * speeds.matrix_efficiency)
    return flops / (rate.rate * speeds.matrix_efficiency)


def _rate(operator: Operator, speeds: Speeds) -> Rate:
    own = {"attention": speeds.attention, "attention backward": speeds.attention_backward}.get(operator.kind, {})
    if operator.dtype in own:
        return own[operator.dtype]
    known = speeds.matrix[operator.dtype]
    # Sizes of attention are not those of a product of two matrices.
    return known if operator.kind == "matrix" else Rate(rate=known.rate)
