"""What a training step does, as a multiset of operators: to be added up, written as JSON, and told of deeper models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Operator(NamedTuple):
    """An operator on tensors of one size.

    kind: "matrix" (a product of two matrices, or of a batch of them), "attention", "attention backward", "fused
        product" (a kernel that multiplies matrices and does more). Of those that only move bytes: "elementwise" (with
        a new tensor as its result), "in place", "permuted" (a copy in another order of dimensions), "softmax", "norm",
        "activation", "random", "normal", "reduction", "gather"; "fresh" (pages of memory that a CPU's kernel clears
        when they are first touched).
    dtype: of what is computed with, such as "float32".
    size: of a product: batch, rows, inner dimension, columns; of attention: samples, heads, positions of queries and of
        keys, size of a head, and 1 where it is causal; else empty.
    flops: floating-point operations of products, as torch counts them (of causal attention: without regard to that).
    read, written: bytes.  launches: kernels that are started for it; a share of one, where one takes many tensors.
    """

    name: str
    kind: str
    dtype: str
    size: tuple[int, ...]
    flops: int
    read: int
    written: int
    launches: float

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Operation(NamedTuple):
    """An operator in a step.

    phase: forward, backward or optimizer.  recomputed: it runs again what the forward pass ran already.
    place: "device"; "moved" (a copy between the device and host memory); "host" (it runs on the host's processor).
    """

    operator: Operator
    phase: str
    recomputed: bool
    place: str


@dataclass(frozen=True)
class Work:
    """How often a step runs each operation. Counts of a difference may be negative."""

    counts: Mapping[Operation, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Operations of all products on the device."""
        return sum(operation.operator.flops * times for operation, times in self.counts.items())

    @property
    def recomputed_flops_share(self) -> float:
        """The share of `flops` that the backward pass spends on running forward again. 0.0 where there are none."""
        again = sum(each.operator.flops * times for each, times in self.counts.items() if each.recomputed)
        return again / self.flops if self.flops else 0.0

    @property
    def moved_bytes(self) -> int:
        """Bytes that operators on the device read and write."""
        return sum(each.operator.moved * times for each, times in self.counts.items() if each.place == "device")

    @property
    def host_transfer_bytes(self) -> int:
        """Bytes that are copied between the device and host memory, in both directions."""
        return sum(each.operator.written * times for each, times in self.counts.items() if each.place == "moved")

    @property
    def launches(self) -> float:
        """Kernels that are started on the device."""
        return sum(each.operator.launches * times for each, times in self.counts.items() if each.place == "device")

    def to_json(self) -> list[list[Any]]:
        """One row for each operation: its operator's fields, its own, and how often it runs."""
        rows = [
            [*operator[:3], list(operator.size), *operator[4:], *where, times]
            for (operator, *where), times in self.counts.items()
        ]
        return sorted(rows, key=str)

    @classmethod
    def from_json(cls, rows: list[list[Any]]) -> Work:
        """The inverse of `to_json`."""
        operations = (Operation(Operator(row[0], row[1], row[2], tuple(row[3]), *row[4:8]), *row[8:11]) for row in rows)
        return cls({operation: row[11] for operation, row in zip(operations, rows, strict=True)})


def extrapolated(first: Work, second: Work, times: int) -> Work:
    """The work of a model with `times` layers more than that of `first`, where `second` has one layer more:

        W(n + times) = W(n) + times · (W(n + 1) − W(n))        (on counts)

    It is exact where layers are alike. times: any whole number from 0.  Operations that end with a count of 0 are
    left out.
    """
    counts: Counter[Operation] = Counter()
    for operation in first.counts.keys() | second.counts.keys():
        base = first.counts.get(operation, 0)
        counts[operation] = base + times * (second.counts.get(operation, 0) - base)
    return Work({operation: count for operation, count in counts.items() if count})
