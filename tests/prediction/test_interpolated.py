"""Shapes told from a few traced ones are those that tracing gives, byte for byte."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_profile import sampled
from meftbench.catalogue.profiles import find_profile
from meftbench.plan.cell import Cell
from meftbench.prediction.columns import Trace, What, number_of
from meftbench.prediction.interpolated import Interpolated
from meftbench.prediction.tracer import Traced, Tracer
from models import a_cell_of

CELLS = {
    ("llama", "full"): {},
    ("llama", "lora+checkpoint"): {},
    ("llama", "meft1-exact"): {},
    ("llama", "full+chunked_loss"): {},
    ("bert", "full"): {},
    ("bert", "meft1-exact"): {},
    ("bert", "lora, eager"): {"attention_requested": "eager"},
}
BATCHES = [1, 2, 3, 4, 6, 7, 8]
LENGTHS = [128, 256, 384, 512, 640, 768, 300, 300 + 128, 77]


def a_cell(backbone: str, method: str) -> Cell:
    name = method.partition(",")[0]
    overrides = {"max_position_embeddings": 2048}
    cell = a_cell_of(backbone, name, 2, precision="bf16", **CELLS[backbone, method])
    return cell.model_copy(update={"model_config_overrides": cell.model_config_overrides | overrides})


def in_shape(cell: Cell, batch_size: int, length: int) -> Cell:
    sizes = {"batch_size": batch_size, "micro_batch_size": batch_size, "sequence_length": length}
    return cell.model_copy(update=sizes)


@cache
def told_and_tracer(backbone: str, method: str) -> tuple[Cell, Interpolated, Tracer]:
    tracer, cell = Tracer(find_profile("a100-80gb")), a_cell(backbone, method)
    shapes = [(batch, length) for batch in BATCHES for length in LENGTHS]
    return cell, Interpolated(tracer, cell, shapes), tracer


def assert_same(told: Traced, traced: Traced) -> None:
    assert told.trace.has_events_of(traced.trace)
    np.testing.assert_array_equal(traced.trace.nbytes, told.trace.nbytes)
    assert (traced.tokens, traced.sizes, traced.attention) == (told.tokens, told.sizes, told.attention)


@pytest.mark.parametrize(("backbone", "method"), sampled(CELLS, 2))
@settings(max_examples=3, deadline=None)
@given(batch_size=st.sampled_from(BATCHES), length=st.sampled_from(LENGTHS))
def test_a_told_shape_is_the_traced_one(backbone, method, batch_size, length):
    cell, interpolated, tracer = told_and_tracer(backbone, method)

    told = interpolated.at(batch_size, length)

    assert_same(told, tracer(in_shape(cell, batch_size, length)))


def synthetic(events: int, *nbytes: int, attention: str = "flash") -> Traced:
    """A trace of `events` allocations, of which the first have `nbytes`, and the others one byte."""
    sizes = [*nbytes, *[1] * (events - len(nbytes))]
    columns = ([number_of(What("alloc"))] * events, range(events), sizes)
    trace = Trace(*(np.array(column, dtype=np.int64) for column in columns))
    return Traced(trace, {}, frozenset({attention}), 7)


def rule(*terms: str, tile: int | None = None):
    """Traces cells in which an allocation has the bytes of each term; a further one where tokens exceed a tile."""

    def trace(cell: Cell) -> Traced:
        b, n = cell.batch_size, cell.sequence_length
        more = tile is not None and b * n > tile
        return synthetic(
            len(terms) + more,
            *(eval(term, {"max": max, "min": min, "abs": abs}, {"b": b, "n": n}) for term in terms),
        )

    return trace


GRID = [(2**i, 128 * 2**j) for i in range(8) for j in range(8)]
DENSE = [(b, n) for b in range(1, 8) for n in range(128, 128 * 7, 128)]


@pytest.mark.parametrize("shapes", [GRID, DENSE], ids=["powers of two", "all"])
@pytest.mark.parametrize(
    ("terms", "tile"),
    [
        (["4 * b * n", "b", "n * 512", "64"], None),
        (["b * n * n", "n * n // 2", "3 * b * n + 5"], None),
        (["8 * (b * n // 10)", "b * n"], None),
        (["b * n", "max(b * n, 9000)"], None),
        (["b * n", "min(b * n, 9000)", "abs(n - 512) + 1"], None),
        (["b * n", "b * n * n"], 5000),
        (["b * n", "n"], 2**20),
    ],
)
def test_every_shape_of_a_rule_is_told(shapes, terms, tile):
    trace = rule(*terms, tile=tile)
    interpolated = Interpolated(trace, a_cell_of("llama", "full"), shapes)

    for shape in shapes:
        assert_same(interpolated.at(*shape), trace(in_shape(a_cell_of("llama", "full"), *shape)))


def test_few_shapes_are_traced_where_nothing_changes():
    cell = a_cell_of("llama", "full")
    linear, squares = (Interpolated(rule(*terms), cell, GRID) for terms in (["b * n"], ["b * n * n", "n * n"]))

    linear.at(128, 256)
    squares.at(128, 256)

    assert 12 >= linear.traced
    assert 16 >= squares.traced


def test_more_shapes_are_traced_where_events_change():
    cell = a_cell_of("llama", "full")
    changing, constant = Interpolated(rule("b * n", tile=5000), cell, GRID), Interpolated(rule("b * n"), cell, GRID)
    for shape in GRID:
        changing.at(*shape)
        constant.at(*shape)

    assert constant.traced < changing.traced < len(GRID)
    assert 1 == len(changing.at(2, 256).trace)
    assert 2 == len(changing.at(64, 256).trace)


def test_sizes_that_are_no_polynomial_are_all_traced():
    cell = a_cell_of("llama", "full")
    interpolated = Interpolated(rule("(b * 7919 + n // 128 * 104729) % 1009 + 1"), cell, GRID)

    for shape in GRID:
        interpolated.at(*shape)

    assert len(GRID) == interpolated.traced


def test_a_shape_that_was_not_named_is_refused():
    with pytest.raises(KeyError):
        Interpolated(rule("b"), a_cell_of("llama", "full"), GRID).at(3, 128)
