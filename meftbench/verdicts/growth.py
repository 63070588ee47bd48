"""What grew: buffers and categories at the memory peak of a cell, held against those of the same cell in another run.

Records list the buffers at the peak of forward and backward (`peak_buffers`, from 1 % of the activation peak on), and
the bytes of each category at the peak of the step (`BREAKDOWN`). Both are needed to say what a larger peak consists of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.records.outcome import Outcome, as_number, said, said_apart

# Metrics that are peaks, in the order in which they are looked at.
PEAKS = (
    "activation_peak_bytes",
    "peak_allocated_bytes",
    "peak_requested_bytes",
    "peak_active_bytes",
    "peak_reserved_bytes",
)
Kind = Literal["new", "larger", "smaller", "gone", "same"]
# Buffers that agree in one of these belong together; each in turn is tried on what is left. First all that is recorded;
# then without the place, since functions are renamed; then without the module, since modules are moved; then without
# the shape, since shapes are what often grows. Sizes come before, since several rows may agree in all else.
_SAME = ("op", "shape", "dtype", "category")
_KEYS: tuple[tuple[str, ...], ...] = (
    (*_SAME, "module", "place", "bytes", "count"),
    (*_SAME, "module", "place"),
    (*_SAME, "module", "bytes", "count"),
    (*_SAME, "module"),
    (*_SAME, "place", "bytes", "count"),
    (*_SAME, "place"),
    (*_SAME, "bytes", "count"),
    _SAME,
    ("op", "category", "module", "place"),
    ("op", "category", "place"),
)


@dataclass(frozen=True)
class Part:
    """One kind of buffer, or one category, in both cells.

    name: what it is, for people.  before, after: bytes, 0 where it is absent.  counts: how many buffers in each cell.
    category: of the breakdown, such as `activations`.  module: the path of the buffers' module in the model, "" for the
    model itself; None: of a category, or not known.
    """

    name: str
    category: str
    before: int
    after: int
    counts: tuple[int, int] = (1, 1)
    module: str | None = None

    @property
    def delta(self) -> int:
        """After minus before, in bytes."""
        return self.after - self.before

    @property
    def kind(self) -> Kind:
        """Whether the part is new, larger, smaller, gone or the same."""
        if not self.delta:
            return "same"
        if not self.before or not self.after:
            return "gone" if self.before else "new"
        return "larger" if self.delta > 0 else "smaller"

    def text(self) -> str:
        """`larger: NAME 14.1 MiB -> 16.0 MiB (+1.9 MiB)`, on one line."""
        if self.kind in ("new", "gone"):
            return f"{self.kind}: {self.name} {said(self.after or self.before, 'byte')}"
        before, after = said_apart(self.before, self.after, "byte")
        counts = "" if self.counts[0] == self.counts[1] else f", {self.counts[0]} -> {self.counts[1]} of them"
        return f"{self.kind}: {self.name} {before} -> {after} ({signed_bytes(self.delta)}{counts})"


@dataclass(frozen=True)
class Growth:
    """Why a peak of a cell is higher than in the other run.

    peaks: each peak metric that grew, with its bytes before and after.
    categories: bytes by category at the peak of the step.  buffers: at the peak of forward and backward; None where the
        records do not list them.  Both hold only what differs, the largest growth first.
    """

    label: str
    cell_id: str
    peaks: dict[str, tuple[int | float, int | float]]
    categories: tuple[Part, ...]
    buffers: tuple[Part, ...] | None

    def lines(self) -> list[str]:
        """The cell with its peaks, then a line for each category and each buffer that differs."""
        peaks = ", ".join(f"{name} {signed_bytes(after - before)}" for name, (before, after) in self.peaks.items())
        lines = [f"{self.label}: {peaks}"]
        lines += [f"  category {part.text()}" for part in self.categories]
        lines += [f"  buffer {part.text()}" for part in self.buffers or ()]
        return [*lines, f"  {remark}"] if (remark := self.unexplained()) else lines

    def unexplained(self) -> str:
        """How much of the growth no listed buffer accounts for; "" where all of it is accounted for."""
        if "activation_peak_bytes" not in self.peaks or self.buffers is None:
            return ""
        before, after = self.peaks["activation_peak_bytes"]
        rest = (after - before) - sum(part.delta for part in self.buffers)
        if not rest:
            return ""
        if not self.buffers:
            return "no listed buffer differs: records list buffers from 1 % of the activation peak on"
        return f"{signed_bytes(rest)} is in buffers that are not listed (each below 1 % of the activation peak)"


def growth(before: Outcome, after: Outcome) -> Growth | None:
    """What grew from `before` to `after`, the same cell in two runs.

    None where no peak is higher, or where the records say nothing of what it consists of.
    """
    peaks = {}
    for name in PEAKS:
        values = _both(before, after, name)
        if values and values[1] > values[0]:
            peaks[name] = values
    categories, buffers = changed_categories(before, after), grown_buffers(before, after)
    if not peaks or not (categories or buffers is not None):
        return None
    return Growth(after.label, after.cell_id, peaks, categories, buffers)


def grown_buffers(before: Outcome, after: Outcome) -> tuple[Part, ...] | None:
    """The buffers at the peak of forward and backward that differ, the largest growth first.

    None where either record does not list its buffers.
    """
    first, second = listed_buffers(before), listed_buffers(after)
    if first is None or second is None:
        return None
    if not (names_modules(first) and names_modules(second)):
        first, second = _of_all_modules(first), _of_all_modules(second)
    return _differing(_matched(first, second))


def changed_categories(before: Outcome, after: Outcome) -> tuple[Part, ...]:
    """The categories of which the bytes at the peak of the step differ, the largest growth first."""
    parts = []
    for name in BREAKDOWN:
        if values := _both(before, after, name):
            category = name.removesuffix("_bytes")
            parts.append(Part(category, category, int(values[0]), int(values[1])))
    return _differing(parts)


def _both(before: Outcome, after: Outcome, name: str) -> tuple[int | float, int | float] | None:
    """A metric in both cells; None where one lacks it, it is of another source, or no finite number."""
    first, second = before.figure(name), after.figure(name)
    if first is None or second is None or first.source != second.source:
        return None
    if not math.isfinite(first.value) or not math.isfinite(second.value):
        return None
    return first.value, second.value


def listed_buffers(outcome: Outcome) -> list[dict[str, Any]] | None:
    """The rows of `peak_buffers`, largest first; None where the record has none."""
    metric = outcome.metric("peak_buffers")
    rows = metric.value if metric is not None else None
    if not isinstance(rows, list):
        return None
    # A damaged row, without its size, cannot be held against another.
    return [row for row in rows if isinstance(row, dict) and _is_size(row.get("bytes"))]


def names_modules(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether the buffers are listed by module; records of version 0.1 before modules were noted have none."""
    return any(row.get("module") is not None for row in rows)


def _of_all_modules(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without their modules: those that differ in nothing else are one, with their bytes and counts added."""
    joined: dict[Any, dict[str, Any]] = {}
    for row in rows:
        count = row.get("count") or 1
        key = (row["bytes"] / count, *_key_of((*_SAME, "place"))(row))
        seen = joined.get(key, {"bytes": 0, "count": 0})
        joined[key] = row | {"bytes": seen["bytes"] + row["bytes"], "count": seen["count"] + count, "module": None}
    return list(joined.values())


def _is_size(value: object) -> bool:
    number = as_number(value)
    return number is not None and math.isfinite(number)


def largest_buffers(outcome: Outcome, category: str | None = None, most: int = 2) -> list[str]:
    """The largest buffers at the peak as texts with their bytes, of one category or of all; at most `most`."""
    rows = [row for row in listed_buffers(outcome) or [] if category in (None, row.get("category"))]
    return [f"{_buffer_name(row)} {said(row['bytes'], 'byte')}" for row in rows[:most]]


def module_name(path: str) -> str:
    """The path of a module in its model, for people; the model itself has none."""
    return path or "the model itself"


def signed_bytes(count: float) -> str:
    """A difference in bytes with its sign: `+18.0 MiB`, `-1 B`."""
    return f"{'-' if count < 0 else '+'}{said(abs(count), 'byte')}"


def _differing(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(sorted((part for part in parts if part.delta), key=lambda part: (-part.delta, part.name)))


def _matched(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[Part]:
    """Rows of both lists that belong together by one of `_KEYS`; a row without a partner is gone or new."""
    parts: list[Part] = []
    for fields in _KEYS:
        key = _key_of(fields)
        waiting: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for row in first:
            waiting[key(row)].append(row)
        unmatched = []
        for row in second:
            partners = waiting[key(row)]
            if partners:
                parts.append(_part(partners.pop(0), row))
            else:
                unmatched.append(row)
        second = unmatched
        first = [row for rows in waiting.values() for row in rows]
    return [*parts, *(_part(row, None) for row in first), *(_part(None, row) for row in second)]


def _key_of(fields: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
    return lambda row: tuple(str(row.get(name)) for name in fields)


def _part(before: dict[str, Any] | None, after: dict[str, Any] | None) -> Part:
    row = after or before or {}
    sizes = [int(side["bytes"]) if side else 0 for side in (before, after)]
    counts = [int(side.get("count") or 1) if side else 0 for side in (before, after)]
    name = _buffer_name(row)
    if before and after and before.get("shape") != after.get("shape"):
        name = f"{name} (was {_shape(before)})"
    return Part(name, str(row.get("category")), sizes[0], sizes[1], (counts[0], counts[1]), row.get("module"))


def _buffer_name(row: dict[str, Any]) -> str:
    """`mm.default 384 × 1,536 float32 (6 of them, gradients, of encoder.layer.*.output, in step:forward_backward)`."""
    count = row.get("count") or 1
    facts = [f"{count} of them"] if count != 1 else []
    facts.append(str(row.get("category")))
    if row.get("module") is not None:
        facts.append(f"of {module_name(row['module'])}")
    facts.append(f"in {row.get('place')}")
    return f"{row.get('op')} {_shape(row)} {row.get('dtype')} ({', '.join(facts)})"


def _shape(row: dict[str, Any]) -> str:
    sizes = row.get("shape") or []
    return " × ".join(f"{size:,}" if isinstance(size, int) else str(size) for size in sizes) or "scalar"
