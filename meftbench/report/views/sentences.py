"""Words that answers have in common: lists of methods, shares, and verbs for as many subjects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meftbench.plan.axes import SHAPE
from meftbench.report.views.savings import is_number

ACTIVATION, STEP = "activation_peak_bytes", "step_time_s"
NAMED = 4  # methods that a sentence lists at most; the facts have all


@dataclass(frozen=True)
class Answer:
    """What the cells of one shape and setting say together.

    title: the shape and what the cells share.  sentences: without a capital and a full stop.
    facts: the numbers behind the sentences, in bytes and seconds, as JSON can hold them.
    """

    title: str
    sentences: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def shape_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in SHAPE)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`, or the first few `and 7 more`."""
    if len(names) > NAMED:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def by_source(rows: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows that have the metric as a finite number above zero, for each source of it: sources are not mixed."""
    known = [row for row in rows if is_number(row[metric]) and row[metric] > 0]
    sources = sorted({str(row[f"{metric}_source"]) for row in known})
    return [(source, [row for row in known if row[f"{metric}_source"] == source]) for source in sources]


def verb(word: str, rows: Sequence[object]) -> str:
    """The verb for as many subjects: `holds`, `hold`."""
    return word if len(rows) > 1 else {"are": "is"}.get(word, f"{word}s")


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.005 else "less than 1 %"
