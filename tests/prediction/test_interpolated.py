"""Shapes told from a few traced ones are those that tracing gives, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.catalogue.profiles import find_profile
from meftbench.plan.cell import Cell
from meftbench.prediction.columns import Trace
from meftbench.prediction.interpolated import Interpolated
from meftbench.prediction.tracer import Traced, Tracer
from models import a_cell_of

CELLS = {
    ("llama", "full"): {},
    ("llama", "lora+checkpoint"): {},
    ("llama", "meft1-exact"): {},
    ("llama", "full+chunked_loss"): {},
    ("bert", "full"): {},
    ("bert", "lora+checkpoint"): {},
    ("bert", "meft1-exact"): {},
    ("bert", "lora, eager"): {"attention_requested": "eager"},
}
BATCHES = [1, 2, 3, 4, 5, 7, 8, 12, 16]
LENGTHS = [128, 256, 384, 512, 640, 768, 1024, 300, 300 + 128, 300 + 256, 77]


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


@pytest.mark.parametrize(("backbone", "method"), CELLS, ids=" ".join)
@settings(max_examples=4, deadline=None)
@given(batch_size=st.sampled_from(BATCHES), length=st.sampled_from(LENGTHS))
def test_a_told_shape_is_the_traced_one(backbone, method, batch_size, length):
    cell, interpolated, tracer = told_and_tracer(backbone, method)

    told = interpolated.at(batch_size, length)

    assert_same(told, tracer(in_shape(cell, batch_size, length)))
