"""Traces of many shapes of one method told from those of a few.

Between the points where a kernel, a tile count or a chunk count changes, two shapes have the same events, and the bytes
of each event are a polynomial in batch size b and length l: of degree 1 in b, as samples do not know of each other, and
of degree 2 in l, as attention compares pairs of positions. Kernels that take tokens in parts of a fixed number have
buffers for the number of whole parts, b · l / n rounded down, which is one more term. A few traced shapes determine the
coefficients exactly.

Which shapes have the same events is not known beforehand. It is assumed of all shapes of a band where its outermost
ones have the same events, and the polynomials through some of the traced shapes give the bytes of the others. A band in
which that is not so is divided by the number of tokens, as tiles and chunks hold a number of tokens, down to shapes
that are all traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from math import lcm, log2

import numpy as np

from meftbench.plan.cell import Cell
from meftbench.prediction.columns import SPREAD, Ints
from meftbench.prediction.tracer import Traced

Sizes = tuple[int, int]  # batch size, and length of a sample
ROUNDED = 128  # flash attention pads lengths to a multiple of it, efficient attention to one of 32, which divides it
_DEGREES = (1, 2)  # in the length, of the polynomials that are tried
# Tokens of a part: of the gradient of an embedding (scratch.py), and of what locks of a fused loss hold.
_PARTS = (10, 128)


class Interpolated:
    """The shapes of one method, of which few are traced.

    trace: traces a cell, as a `Tracer` does.  cell: everything but the shape is taken from it; a batch is one
    micro-batch.  shapes: (batch size, length) of all that will be asked for.
    """

    def __init__(self, trace: Callable[[Cell], Traced], cell: Cell, shapes: Iterable[Sizes]) -> None:
        self._trace, self._cell = trace, cell
        self._known: dict[Sizes, Traced] = {}
        self._band_of: dict[Sizes, _Band | None] = {}
        self._undecided = [list(band) for _, band in groupby(sorted(set(shapes), key=_kind), key=_kind)]

    @property
    def traced(self) -> int:
        """How many shapes were traced; all others are told from them."""
        return len(self._known)

    def at(self, batch_size: int, length: int) -> Traced:
        """What tracing this shape gives, without its `work`.

        Raises KeyError: it is none of the shapes; UserError: as the tracer does.
        """
        shape = (batch_size, length)
        while shape not in self._band_of:
            undecided = next((band for band in self._undecided if shape in band), None)
            if undecided is None:
                raise KeyError(shape)
            self._decide(undecided)
        band = self._band_of[shape]
        if band is None or shape in self._known:
            return self._traced_at(shape)
        return band.told(shape) or self._traced_at(shape)

    def _traced_at(self, shape: Sizes) -> Traced:
        if shape not in self._known:
            batch_size, length = shape
            sizes = {"batch_size": batch_size, "micro_batch_size": batch_size, "sequence_length": length}
            self._known[shape] = self._trace(self._cell.model_copy(update=sizes))
        return self._known[shape]

    def _decide(self, shapes: list[Sizes]) -> None:
        """Find the polynomials of a band, or divide it."""
        self._undecided.remove(shapes)
        counts = sorted({_tokens(shape) for shape in shapes})
        band = next((band for degree in _DEGREES if (band := self._fitted(shapes, degree)) is not None), None)
        if band is not None or len(counts) == 1:
            self._band_of |= dict.fromkeys(shapes, band)
            return
        middle = counts[len(counts) // 2]
        self._undecided.append([shape for shape in shapes if _tokens(shape) < middle])
        self._undecided.append([shape for shape in shapes if _tokens(shape) >= middle])

    def _fitted(self, shapes: list[Sizes], degree: int) -> _Band | None:
        """Polynomials for a band, of a degree in the length. None: its shapes are told by none of that degree, or all
        of them would have to be traced to know."""
        samples, checked = _chosen(shapes, degree)
        if not checked or len(samples) + len(checked) >= len(shapes):
            return None
        first = self._traced_at(samples[0])
        if not all(_alike(first, self._traced_at(shape)) for shape in [*samples, *checked]):
            return None
        band = _Band({shape: self._known[shape] for shape in samples}, degree)
        if not all(_equal(band.told(shape), self._known[shape]) for shape in checked):
            return None
        return band


class _Band:
    """Shapes with the same events, whose bytes are polynomials through those of the samples.

    samples: traced shapes whose terms are a basis of those of the band.  degree: in the length.
    """

    def __init__(self, samples: dict[Sizes, Traced], degree: int) -> None:
        self._basis, self._degree = [_terms(shape, degree) for shape in samples], degree
        self._first, *_ = samples.values()
        # The length of a sample follows the same rule as bytes do. Few events differ in what they have in all samples.
        columns = np.stack([np.append(traced.trace.nbytes, traced.tokens) for traced in samples.values()], axis=1)
        rows, self._row_of = _unique_rows(columns)
        self._rows: list[list[int]] = rows.tolist()

    def told(self, shape: Sizes) -> Traced | None:
        """What tracing the shape gives. None: a value would be no whole number, or negative, so that it is no
        polynomial."""
        weights = _weights(self._basis, _terms(shape, self._degree))
        assert weights is not None, "the terms of the samples are a basis of those of the band"
        divisor = lcm(*(weight.denominator for weight in weights))
        factors = [int(weight * divisor) for weight in weights]
        values = []
        for row in self._rows:
            value, rest = divmod(sum(factor * number for factor, number in zip(factors, row, strict=True)), divisor)
            if rest or value < 0 or (value == 0 and any(row)):
                return None
            values.append(value)
        numbers = np.array(values, dtype=np.int64)[self._row_of]
        trace = replace(self._first.trace, nbytes=numbers[:-1])
        return replace(self._first, trace=trace, tokens=int(numbers[-1]), work=None)


def _kind(shape: Sizes) -> tuple[bool, int]:
    """What only shapes have in common that may be told from each other: operators differ for a batch of one sample, and
    sizes that kernels round up are polynomials only among lengths with the same remainder."""
    batch_size, length = shape
    return batch_size == 1, length % ROUNDED


def _tokens(shape: Sizes) -> int:
    return shape[0] * shape[1]


def _terms(shape: Sizes, degree: int) -> list[int]:
    """The terms of the polynomials, each without its coefficient."""
    batch_size, length = shape
    powers = [batch_size**of_batch * length**of_length for of_batch in (0, 1) for of_length in range(degree + 1)]
    return powers + [_tokens(shape) // part for part in _PARTS]


def _chosen(shapes: list[Sizes], degree: int) -> tuple[list[Sizes], list[Sizes]]:
    """Of a band, shapes through which the polynomials are laid, and others by which they are checked."""
    by_tokens = sorted(shapes, key=lambda shape: (_tokens(shape), shape))
    fewest, most = ([s for s in by_tokens if _tokens(s) == _tokens(by_tokens[end])] for end in (0, -1))
    by_batch, by_length = sorted(shapes), sorted(shapes, key=lambda shape: shape[::-1])
    ends = [fewest[0], fewest[-1], most[0], most[-1], by_batch[0], by_batch[-1], by_length[0], by_length[-1]]
    outermost = list(dict.fromkeys(ends))
    middle = [sum(log2(shape[axis]) for shape in shapes) / len(shapes) for axis in (0, 1)]
    inside = sorted(
        set(shapes).difference(outermost),
        key=lambda shape: (sum(abs(log2(size) - at) for size, at in zip(shape, middle, strict=True)), shape),
    )
    samples: list[Sizes] = []
    basis: list[list[int]] = []
    # The outermost are checked, not fitted: where a size ceases to be a polynomial within the band, they differ.
    for shape in [*inside, *outermost]:
        terms = _terms(shape, degree)
        if _weights(basis, terms) is None:
            samples.append(shape)
            basis.append(terms)
        if len(basis) == len(terms):
            break
    # Where tiles or chunks leave a rest, a large number of tokens with few factors of two shows it.
    oddest = min(by_tokens, key=lambda shape: (_tokens(shape) & -_tokens(shape), -_tokens(shape)))
    left = [shape for shape in inside if shape not in samples]
    checked = dict.fromkeys([*outermost, *left[:1], oddest])
    return samples, [shape for shape in checked if shape not in samples]


def _weights(basis: list[list[int]], target: list[int]) -> list[Fraction] | None:
    """The numbers by which the linearly independent rows of `basis` are multiplied so that their sum is `target`; None:
    there are none."""
    rows = [[Fraction(row[index]) for row in [*basis, target]] for index in range(len(target))]
    for column in range(len(basis)):
        pivot = next(index for index in range(column, len(rows)) if rows[index][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for index, row in enumerate(rows):
            if index != column and row[column]:
                rows[index] = [a - row[column] * b for a, b in zip(row, rows[column], strict=True)]
    if any(row[-1] for row in rows[len(basis) :]):
        return None
    return [row[-1] for row in rows[: len(basis)]]


def _unique_rows(table: Ints) -> tuple[Ints, Ints]:
    """The rows that differ, and for each row the number of the one that is equal to it."""
    hashes = np.zeros(len(table), dtype=np.int64)
    for column in table.T:
        hashes = hashes * SPREAD + column
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    rows = table[first]
    if np.array_equal(rows[number], table):
        return rows, number
    return table, np.arange(len(table))  # different rows have the same hash: each row for itself


def _alike(first: Traced, second: Traced) -> bool:
    """Whether two shapes differ in sizes alone."""
    alike = (first.sizes, first.attention) == (second.sizes, second.attention)
    return alike and second.trace.has_events_of(first.trace)


def _equal(told: Traced | None, traced: Traced) -> bool:
    if told is None or told.tokens != traced.tokens:
        return False
    return np.array_equal(told.trace.nbytes, traced.trace.nbytes)
