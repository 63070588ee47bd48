"""Which row of a plan is better: the order of the answer, the same for whoever searches and whoever prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meftbench.catalogue.methods import METHODS

Row = Mapping[str, Any]


def method_of(row: Row) -> str:
    """The name of the method of a row, without its settings and levers."""
    return str(row["parts"][0]["name"])


def has_backward(row: Row) -> bool:
    """Whether the method has a backward pass. One without needs many more steps, so its speed is not comparable."""
    return METHODS[method_of(row)].backward


def by_time(rows: Iterable[Row]) -> bool:
    """Whether all of `rows` have a predicted time; otherwise they are compared by `relative_cost`."""
    rows = list(rows)
    return bool(rows) and all(row["tokens_per_s"] is not None for row in rows)


def fastest_first(rows: Sequence[Any]) -> list[Any]:
    """Rows in the order in which they are to be taken, the best first.

    Methods with a backward pass come first. Among these: by predicted tokens per second where every row has them, else
    by arithmetic per token (relative_cost), then by bytes per token over the host's bus. Of equals, the larger
    micro-batch comes first, then the smaller memory, then the label, so that the order never depends on chance.
    """
    timed = by_time(rows)

    def key(row: Row) -> tuple[Any, ...]:
        tokens = max(1, (row["micro_batch_size"] or 1) * row["sequence_length"])
        speed = (-row["tokens_per_s"],) if timed else (row["relative_cost"], row["host_transfer_bytes"] / tokens)
        rest = (-(row["micro_batch_size"] or 0), row["smallest_reserved_bytes"], row["method"], row["precision"])
        return (not has_backward(row), *speed, *rest, row["optimizer"])

    return sorted(rows, key=key)
