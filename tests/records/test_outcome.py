"""The repeats of a cell combined into one figure: what diverged is not hidden, whatever the order."""

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_record, counted, measured
from meftbench.records.outcome import collect

ERROR, SPEED, PEAK = "gradient_rel_max", "tokens_per_s", "peak_allocated_bytes"


def the_figure(name, metrics):
    (outcome,) = collect(a_record(metrics={name: metric}, repeat=number) for number, metric in enumerate(metrics))
    return outcome.figure(name)


@pytest.mark.parametrize("kind", [measured, counted])
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=4), st.integers(0, 4))
def test_a_repeat_that_is_not_a_number_makes_the_figure_so(kind, numbers, place):
    """Wherever among the repeats it is; the spread is that of the others."""
    repeats = [*numbers[:place], math.nan, *numbers[place:]]

    figure = the_figure(ERROR, map(kind, repeats))

    assert math.isnan(figure.value)
    assert (min(numbers), max(numbers)) == (figure.low, figure.high)


@pytest.mark.parametrize(
    ("name", "repeats", "value"),
    [
        (ERROR, (1e-7, 1e-7, math.inf), math.inf),
        (ERROR, (1e-7, 2e-7, -math.inf), 1e-7),
        (SPEED, (100.0, 200.0, -math.inf), -math.inf),
        (SPEED, (100.0, 200.0, math.inf), 200.0),
        (ERROR, (1e-7, 3e-7, 2e-7), 2e-7),
    ],
)
def test_an_infinity_that_is_worse_is_not_hidden_by_a_median(name, repeats, value):
    """An error that overflowed in one repeat of three is the cell's; the better infinity is not."""
    for order in permutations(repeats):
        assert value == the_figure(name, map(measured, order)).value


def test_what_is_counted_is_the_largest_of_the_repeats():
    assert 7 == the_figure(PEAK, map(counted, (5, 7, 6))).value
