"""Bytes and durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.units import format_bytes, format_duration, parse_bytes, parse_duration


@given(st.integers(0, 2**20), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_bytes_come_back_from_their_text(count, unit):
    """Whole units survive; what is shown with one decimal is off by at most half of it."""
    exact = parse_bytes(f"{count}{unit}")
    shown = parse_bytes(format_bytes(exact).replace(",", ""))

    assert abs(exact - shown) <= 0.05 * max(size for size in (1, 2**10, 2**20, 2**30) if size <= max(exact, 1)) + 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 MiB", 1572864), ("0B", 0), (412, 412), ("3kib", 3072)],
)
def test_binary_and_decimal_units_are_not_the_same(text, count):
    assert count == parse_bytes(text)


@pytest.mark.parametrize("wrong", ["24", "GiB", "24 Gibs", "-1MiB", True, "1e3MiB", ""])
def test_an_amount_without_a_unit_or_with_another_is_refused(wrong):
    with pytest.raises(ValueError, match="is not an amount of memory"):
        parse_bytes(wrong)


@given(st.floats(0, 10**6, allow_nan=False))
def test_seconds_are_seconds(seconds):
    assert seconds == parse_duration(seconds)
    assert float(f"{seconds:.3f}") == parse_duration(f"{seconds:.3f}s")


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("10m", 600), ("10min", 600), ("1.5h", 5400), (3, 3)])
def test_durations_have_units(text, seconds):
    assert pytest.approx(seconds) == parse_duration(text)


@pytest.mark.parametrize("wrong", ["soon", "10", "10 weeks", True, "-1s"])
def test_what_is_no_duration_is_refused(wrong):
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(wrong)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.85, "850 ms"), (12.34, "12.3 s"), (245, "4m 05s"), (7380, "2h 03m"), (59.99, "60.0 s")]
)
def test_durations_are_shown_in_the_unit_that_fits(seconds, text):
    assert text == format_duration(seconds)
