"""Operators that others measured on an A100 and on H100s are predicted to the last digit that was published."""

from __future__ import annotations

import runpy
import struct
from pathlib import Path

import pytest

MiB = 2**20
TOLERANCE = MiB // 100

CAMPAIGN = runpy.run_path(str(Path(__file__).resolve().parents[2] / "reports" / "campaigns" / "published_operators.py"))


@pytest.fixture(scope="module")
def rows():
    return CAMPAIGN["predicted_operators"]()


def named(row):
    return f"{row['operator']} {row['mode']} {row['size_name']}={row['size']} on {row['device']}"


def as_published(nbytes):
    """MiB, rounded to a 32-bit float, as the scripts did before they wrote them down."""
    return struct.unpack("f", struct.pack("f", nbytes / MiB))[0]


def test_every_row_is_predicted_within_a_hundredth_of_a_mib(rows):
    """All 56 rows are there, and none is further away."""
    differences = {named(row): row["predicted_bytes"] - row["measured_bytes"] for row in rows}

    assert 56 == len(differences)
    assert {} == {name: nbytes for name, nbytes in differences.items() if abs(nbytes) > TOLERANCE}


def test_every_row_is_predicted_to_the_last_digit_that_was_published(rows):
    """What is left of a difference is the rounding of what was published."""
    measured = {named(row): row["measured_bytes"] / MiB for row in rows}
    assert measured == {named(row): as_published(row["predicted_bytes"]) for row in rows}


def test_embeddings_differ_by_vocabulary_as_measured():
    """Whatever else was alive in that process, it is the same number of bytes beside all eight vocabularies."""
    beside = CAMPAIGN["beside_embeddings"]()

    assert {768: 8, 4096: 8} == {width: len(levels) for width, levels in beside.items()}
    assert {768: 1, 4096: 1} == {width: len(set(levels)) for width, levels in beside.items()}
    assert min(map(min, beside.values())) > 0


def test_the_table_is_printed(rows, capsys, monkeypatch):
    """A line a row with both numbers and their difference, and a line for each width of the embeddings."""
    main = CAMPAIGN["main"]
    monkeypatch.setitem(main.__globals__, "predicted_operators", lambda: rows[:2])
    monkeypatch.setitem(main.__globals__, "beside_embeddings", lambda: {768: [5, 7]})

    assert 0 == main([])

    header, first, second, embedding = capsys.readouterr().out.splitlines()
    assert ["operator", "device", "measured", "predicted", "difference", "bytes"] == header.split()
    for row, line in zip(rows, (first, second), strict=False):
        assert line.startswith(f"{row['operator']} full V={row['size']} ")
        assert f"{row['measured_bytes']:,d}" in line
    assert embedding.endswith("5 to 7 bytes")
