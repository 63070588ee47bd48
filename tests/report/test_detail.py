"""One record for people."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from meftbench.catalogue.metrics import METRICS
from meftbench.records.record import Metric
from meftbench.report.console import wrapped
from meftbench.report.views.detail import print_records, sections
from tests.builders import MiB, a_measured_cell, a_run, measured

BUFFERS = [
    {
        "bytes": 24 * MiB,
        "count": 2,
        "category": "activations",
        "op": "_to_copy.default",
        "shape": [8, 512, 768],
        "dtype": "int32",
        "place": "arithmetic:lift",
    }
]


def test_what_is_alive_at_the_peak_is_told_buffer_by_buffer():
    """Bytes with their source, how many, shape, type and place; nowhere else in the record."""
    record = a_measured_cell("meft1", metrics={"peak_buffers": Metric(BUFFERS, "counted")})

    (section,) = [s for s in sections(record) if s.title == "What is alive at the peak of forward and backward"]

    meaning = "activations: 2 of them, 8 × 512 × 768 int32, in arithmetic:lift"
    assert [("_to_copy.default", "24.0 MiB (counted)", meaning)] == section.rows
    assert "peak_buffers" not in {row[0] for s in sections(record) for row in s.rows}


def test_the_modules_that_hold_most_are_told_with_their_share():
    """Beside each buffer its module; below, the sums by module, the largest first, and of what they consist."""
    rows = [
        BUFFERS[0] | {"module": "encoder.layer.*.attention"},
        BUFFERS[0] | {"module": "encoder.layer.*.attention", "category": "gradients", "bytes": 3 * MiB},
        BUFFERS[0] | {"module": "", "bytes": 5 * MiB},
        BUFFERS[0] | {"module": None, "bytes": MiB},
    ]
    record = a_measured_cell("meft1", metrics={"peak_buffers": Metric(rows, "counted")})

    found = {section.title: section.rows for section in sections(record)}

    buffers = found["What is alive at the peak of forward and backward"]
    assert buffers[0][2].endswith("8 × 512 × 768 int32, of encoder.layer.*.attention, in arithmetic:lift")
    assert buffers[2][2].endswith("int32, of the model itself, in arithmetic:lift")
    assert [
        (
            "encoder.layer.*.attention",
            "27.0 MiB (counted)",
            "82% of these buffers: activations 24.0 MiB, gradients 3.0 MiB",
        ),
        ("the model itself", "5.0 MiB (counted)", "15% of these buffers: activations 5.0 MiB"),
        ("no module", "1.0 MiB (counted)", "3% of these buffers: activations 1.0 MiB"),
    ] == found["Of that, the modules of the model that hold most"]


def test_a_record_without_it_has_no_such_section():
    """Older records, and cells of a single step."""
    record = a_measured_cell("meft1", metrics={"peak_buffers": Metric(None, "counted", absent="takes two steps")})

    assert "What is alive at the peak of forward and backward" not in {s.title for s in sections(record)}


def test_the_start_has_a_section_of_its_own():
    """Loss at the start, that of the pre-trained model, and the shift."""
    metrics = {"starting_loss": measured(15.257), "pretrained_loss": measured(3.084)}
    record = a_measured_cell("meft1", metrics=metrics | {"starting_point_shift": measured(1.08)})

    (section,) = [s for s in sections(record) if s.title == "The starting point, before any training"]

    assert [
        ("starting_loss", "15.3 (measured)"),
        ("pretrained_loss", "3.08 (measured)"),
        ("starting_point_shift", "1.08 ratio (measured)"),
    ] == [row[:2] for row in section.rows]


@pytest.mark.parametrize("width", [20, 40, 79, 80, 120])
def test_no_value_of_a_record_is_cut(tmp_path, width):
    """On a narrow terminal name, value and meaning of a metric stand below each other."""
    run, stream = a_run(tmp_path / "run", a_measured_cell("meft1")), io.StringIO()

    print_records(run, run.records, console=Console(file=stream, width=width))

    words = stream.getvalue().split()
    values = [value for section in sections(run.records[0]) for _, value, _ in section.rows]
    assert len(values) > 10
    assert [] == [word for value in values for word in value.split() if word not in words]


@given(st.text("ab_. ", max_size=60), st.integers(1, 30))
def test_wrapped_text_fits_and_loses_nothing(text, width):
    """But the spaces at which lines end."""
    lines = wrapped(text, width).split("\n")

    assert all(len(line) <= width for line in lines)
    assert text.replace(" ", "") == "".join(lines).replace(" ", "")


@pytest.mark.parametrize("width", [80, 100, 60, 40])
def test_names_are_broken_at_their_joints_only(tmp_path, width):
    """Names of metrics not at all, and those of modules, which are longer than a column, at `_` and `.`."""
    module = "base_model.model.bert.encoder.layer.*.intermediate.intermediate_act_fn"
    metrics = {"peak_buffers": Metric([BUFFERS[0] | {"module": module}], "counted")}
    metrics |= {"first_step_peak_allocated_bytes": measured(5), "activation_gradients_bytes": measured(5)}
    record = a_measured_cell("meft1", metrics=metrics)
    console = Console(file=io.StringIO(), width=width)

    print_records(a_run(tmp_path / "run", record), [record], console=console)

    lines = console.file.getvalue().splitlines()
    names = {word for line in lines for word in line.split() if word in METRICS}
    assert {"first_step_peak_allocated_bytes", "activation_gradients_bytes"} <= names
    pieces = [line.rsplit("  ", 1)[-1].strip() for line in lines]
    ends = [piece for piece in pieces if piece and module.startswith(piece.split()[-1]) and "." in piece]
    assert all(piece.endswith((".", "_", module)) for piece in ends)
    assert all(len(line) <= width for line in lines if not line.startswith("again:"))
