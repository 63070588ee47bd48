"""The frame of runs, and what tables share."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_measured_cell, a_record, a_run, a_sweep, counted, measured
from meftbench.catalogue.labels import Part, joined
from meftbench.catalogue.levers import LEVERS
from meftbench.errors import UserError
from meftbench.plan.cell import Levers
from meftbench.records.record import Metric
from meftbench.records.store import Run, load_run
from meftbench.report.frame_columns import side_bits
from meftbench.report.results import (
    frame_of,
    groups,
    methods_in_order,
    rows_of,
    share_of_full,
    sources,
    without_side_bits,
    write_csv,
)


def test_repeats_are_one_row_with_their_median_and_spread(tmp_path):
    """Measured: the median. The spread is over the repeats."""
    records = [a_record(repeat=i, metrics={"tokens_per_s": measured(v)}) for i, v in enumerate((10, 30, 11))]

    frame = frame_of(a_run(tmp_path, *records))

    assert [(11, 10, 30, 3)] == list(
        zip(frame.tokens_per_s, frame.tokens_per_s_low, frame.tokens_per_s_high, frame.repeats, strict=True)
    )


def test_nan_and_not_taken_are_different(tmp_path):
    """A reconstruction error of nan is a finding; an absent one is not."""
    run = a_run(
        tmp_path,
        a_record(method="meft3", metrics={"reconstruction_rel_max": float("nan")}),
        a_record(metrics={"reconstruction_rel_max": Metric(None, "measured", absent="nothing is reconstructed")}),
    )

    found = list(frame_of(run).reconstruction_rel_max)

    assert found[0] != found[0]
    assert found[1] is None


def test_percent_of_full_is_at_the_same_shape_and_setting(tmp_path):
    """Never across batch, micro-batch, length or precision; none where `full` is not there."""
    metric = "activation_peak_bytes"
    records = [
        a_record(metrics={metric: 100}),
        a_record(method="lora", metrics={metric: 30}),
        a_record(method="lora", micro_batch_size=2, metrics={metric: 7}),
        a_record(method="lora", precision="bf16", metrics={metric: 20}),
        a_record(method="lora+checkpoint", metrics={metric: 10}),
    ]

    shares = share_of_full(frame_of(a_run(tmp_path, *records)))

    assert {records[0].cell_id: 1.0, records[1].cell_id: 0.3, records[4].cell_id: 0.1} == shares


def test_percent_of_full_takes_the_full_of_the_same_micro_batch(tmp_path):
    """Half of `full` at 8 is not half of `full` at 2 × 4: each has its own."""
    metric = "activation_peak_bytes"
    records = [
        a_record(method=method, micro_batch_size=micro, metrics={metric: value})
        for method, micro, value in (("full", 8, 100), ("lora", 8, 50), ("full", 2, 25), ("lora", 2, 20))
    ]

    shares = share_of_full(frame_of(a_run(tmp_path, *records)))

    assert [1.0, 0.5, 1.0, 0.8] == [shares[record.cell_id] for record in records]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"arithmetic": "exact", "side_bits": 5}, 5),
        ({"arithmetic": "exact", "side_bits": None}, 3),
        ({"arithmetic": "exact", "lambda": 0.25}, None),
        ({"arithmetic": "exact", "beta": 1.0}, None),
        ({"arithmetic": "float", "side_bits": None}, None),
        ({"rank": 8}, None),
    ],
)
def test_side_bits_unsaid_are_three_and_of_exact_methods_alone(params, expected):
    """None where a factor is named: what its bits are depends on the method."""
    assert expected == side_bits(params)


def test_a_frame_knows_the_settings_of_reversible_methods(tmp_path):
    """As recorded, side bits as they are in effect."""
    records = [
        a_record(method="meft1-exact", method_params={"coupling": "paper"}),
        a_record(method="meft1"),
        a_record(),
    ]

    frame = frame_of(a_run(tmp_path, *records))

    assert [("exact", 4, "paper", "last"), ("float", None, "paper", "mean"), (None, None, None, None)] == list(
        zip(frame.arithmetic, frame.side_bits, frame.coupling, frame.output, strict=True)
    )


MODULES = st.from_regex(r"[a-z]+([._][a-z0-9]+)?", fullmatch=True)
LORA = {"rank": st.integers(1, 64), "dropout": st.floats(0.01, 0.9), "targets": st.lists(MODULES, min_size=1)}
MEFT = {"adapter_size": st.integers(1, 8), "lambda": st.floats(0.1, 0.9)}
EXACT = {"side_bits": st.integers(1, 8), "coupling": st.sampled_from(["paper", "centred"])}
SETTINGS = {
    name: st.fixed_dictionaries({}, optional=of)
    for name, of in (("full", {}), ("lora", LORA), ("meft1", MEFT), ("meft1-exact", EXACT))
}
METHODS_WITH_SETTINGS = st.one_of(*(st.builds(Part, st.just(name), of) for name, of in SETTINGS.items()))
LEVER_SETS = st.fixed_dictionaries({}, optional={
    "checkpoint": st.fixed_dictionaries({}, optional={"every": st.integers(2, 4)}),
    "offload": st.fixed_dictionaries({}, optional={"what": st.sampled_from(["all", "checkpoints"])}),
    "chunked_loss": st.just({}),
})  # fmt: skip


@given(METHODS_WITH_SETTINGS, LEVER_SETS)
@settings(deadline=None, max_examples=100)
def test_the_row_has_the_parts_of_the_method_whether_the_record_has_them_or_its_label_alone(method, levers):
    """Records that were written before there was the field are read as the others."""
    fields = {"method": method.name, "method_params": method.settings, "levers": Levers.of(levers)}
    record = a_record(**fields, lever_params={name: given for name, given in levers.items() if given})
    cell = {name: value for name, value in record.cell.items() if name != "parts"}
    older = replace(record, cell=cell)
    parts = (method, *(Part(name, levers[name]) for name in LEVERS if name in levers))

    (row,), (row_of_older,) = (
        rows_of(frame_of(Run(Path(), {"name": "toy", "run_id": "run-1"}, {}, [one]))) for one in (record, older)
    )

    assert row == row_of_older
    assert joined(parts) == row["method"]
    assert parts == row["parts"]
    assert row["levers"] == joined(parts[1:])
    assert record.label.startswith(f"bert-base@random/{joined(parts)}/b8/s128")


def test_what_acts_on_terminals_is_an_escape_in_the_parts_of_a_method(tmp_path):
    """As it is in the label."""
    record = a_record()
    record.cell["parts"] = [{"name": "lo\x1bra", "settings": {"targets": "\u202e", "rank": 2}}]

    row = next(rows_of(frame_of(a_run(tmp_path, record))))

    assert "lo\\x1bra(rank=2,targets=\\u202e)" == row["method"] == joined(row["parts"])


def test_a_record_with_parts_that_are_none_is_refused(tmp_path):
    file = a_run(tmp_path, record := a_record()).path / "records.jsonl"
    record.cell["parts"] = [{"name": "lora"}]
    file.write_text(json.dumps(record.to_json()) + "\n")

    with pytest.raises(UserError, match=r'cell.parts has {"name": "lora"}, not a method or lever'):
        load_run(tmp_path)


def test_a_sweep_over_side_bits_is_one_label_without_them():
    """Whatever stands beside them."""
    plain, tiled = Part("meft1-exact", {"side_bits": 4}), Part("meft1-exact", {"side_bits": 4, "tiles": 2})

    assert "meft1-exact" == without_side_bits([plain])
    assert "meft1-exact(tiles=2)+offload(what=all)" == without_side_bits([tiled, Part("offload", {"what": "all"})])


def test_cells_of_other_settings_are_groups_of_their_own(tmp_path):
    """Their titles name the difference, and nothing that they share."""
    run = a_run(tmp_path, a_record(), a_record(precision="bf16"), a_record(precision="bf16", optimizer="sgd"))

    assert [
        "bert-base@random, fp32, optimizer adamw",
        "bert-base@random, bf16, optimizer adamw",
        "bert-base@random, bf16, optimizer sgd",
    ] == [group.title for group in groups(frame_of(run))]


def test_two_runs_of_one_suite_keep_apart(tmp_path):
    """Rows of the same cell in two runs have two names, in which there is no folder of the machine."""
    frame = frame_of([a_run(tmp_path / "a", a_record()), a_run(tmp_path / "b", a_record())])
    same = frame_of([a_run(tmp_path / "c" / "a", a_record()), a_run(tmp_path / "d" / "a", a_record())])

    assert ["toy (a)", "toy (b)"] == list(frame.run)
    assert ["toy (a) #1", "toy (a) #2"] == list(same.run)


def test_methods_stand_in_the_order_of_the_catalogue(tmp_path):
    """Whatever order they ran in."""
    run = a_run(tmp_path, *a_sweep(["meft1", "lora+checkpoint", "full", "lora"], (1,), (16,)))

    assert ["full", "lora+checkpoint", "lora", "meft1"] == methods_in_order(frame_of(run))


def test_the_csv_has_unit_and_source_of_every_metric(tmp_path):
    """A number without its unit and source does not leave the program."""
    file = tmp_path / "t.csv"
    write_csv(frame_of(a_run(tmp_path / "run", a_measured_cell("meft1"))), file)

    with file.open() as stream:
        row = next(csv.DictReader(stream))
    assert "backward" == row["peak_phase [phase]"]
    assert (str(int(23.4 * 8 * 128 * 768 * 4)), "counted") == (
        row["activation_peak_bytes [byte]"],
        row["activation_peak_bytes_source"],
    )


@pytest.mark.parametrize("status", ["oom", "error", "skipped"])
def test_a_cell_that_failed_has_no_numbers(tmp_path, status):
    """What it reached before is not a result."""
    run = a_run(tmp_path, a_record(status, metrics={"peak_allocated_bytes": 5}, status_detail={"message": "a\nb"}))

    frame = frame_of(run)

    assert [(status, None, "a b")] == list(zip(frame.status, frame.peak_allocated_bytes, frame.detail, strict=True))


def test_sources_are_those_that_occur(tmp_path):
    """A source without a value does not count."""
    run = a_run(
        tmp_path,
        a_record(metrics={"peak_allocated_bytes": counted(5)}),
        a_record(batch_size=1, metrics={"peak_allocated_bytes": Metric(None, "measured", absent="no GPU")}),
    )

    assert ["counted"] == sources(frame_of(run), "peak_allocated_bytes")
