"""The axes of a sweep: one table, and everything that follows from it."""

from __future__ import annotations

import typer.main
from hypothesis import given
from hypothesis import strategies as st

from meftbench.cli import app
from meftbench.plan.axes import AXES, FIELDS, FITTED_OPTIONS, IN_LABEL, OF_TRAINING, PREDICTED_OPTIONS, SETTINGS, SHAPE
from meftbench.plan.cell import Cell, value_on
from meftbench.plan.point import Point
from meftbench.plan.suite import Grid
from meftbench.plan.training import Training
from meftbench.plan.where import parse_where

SHAPE_OF_ONE = {"batch_size": 4, "sequence_length": 16}


def test_each_is_a_field_of_a_cell_or_of_its_training():
    assert all(FIELDS[name] in (Training if name in OF_TRAINING else Cell).model_fields for name in AXES)


def test_a_suite_has_each_as_a_key():
    """In `defaults` and `include` all of them, in `grid` all but tasks, in this order: the grid is their product."""
    assert list(AXES) == list(Point.model_fields)
    assert [name for name in AXES if name != "task"] == list(Grid.model_fields)


def test_the_verbs_that_predict_have_those_with_a_help_as_options():
    """`estimate` and `export` each of them, `fit` those that it does not search over itself; each with its help."""
    verbs = typer.main.get_command(app).commands
    options = {verb: {p.name: getattr(p, "help", None) for p in verbs[verb].params} for verb in verbs}

    for verb, names in (("estimate", PREDICTED_OPTIONS), ("export", PREDICTED_OPTIONS), ("fit", FITTED_OPTIONS)):
        assert {name: AXES[name].help for name in names} == {name: options[verb].get(name) for name in names}


def test_tables_tell_cells_apart_by_each_but_the_method():
    assert {*FIELDS.values()} - {"method"} == {*SHAPE, *SETTINGS}


@given(st.data())
def test_a_label_says_each_value_that_is_not_the_default(data):
    """In the order of the table, after the shape; and `--where` finds the cell by it, under the name a suite has."""
    name = data.draw(st.sampled_from([name for name in AXES if FIELDS[name] in IN_LABEL]))
    is_flag = AXES[name].kind == "flag"
    value = data.draw(st.booleans() if is_flag else st.sampled_from(sorted(AXES[name].known)))
    cell = Cell.of("lora", model="bert-tiny@random", **SHAPE_OF_ONE, **{FIELDS[name]: value})
    usual = value == Cell.model_fields[FIELDS[name]].default

    word = AXES[name].word if is_flag else value
    assert cell.label == "bert-tiny@random/lora/b4/s16" + ("" if usual else f"/{word}")
    assert value == value_on(cell, name)
    assert parse_where([f"{name}={value}"])(cell)
    assert not parse_where([f"{name}=x{value}"])(cell)
