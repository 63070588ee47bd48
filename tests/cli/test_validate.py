"""`meftbench validate`: predictions held against what a GPU measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from builders import a_record, a_run, measured
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.runner import process, run_suite
from meftbench.verdicts.validation import (
    METRICS,
    Validation,
    errors,
    predicted_cell,
    predicted_for,
    save,
    saved,
    spreads,
)
from sweeps import a_suite

T4 = {"gpus": {"devices": [{"index": 0, "name": find_profile("t4").device}], "driver": "1", "absent": None}}
TINY = {"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16}


def a_measured(peak, method="lora", **fields):
    """On CUDA; every metric is `peak`."""
    metrics = {name: measured(peak) for name in METRICS}
    return a_record(metrics=metrics, method=method, device="cuda", **(TINY | fields))


@pytest.fixture
def predicting(monkeypatch, worker_command):
    """The real worker, which knows torch."""
    monkeypatch.setattr(process, "WORKER", worker_command)


def predicted_of(record, peak):
    cell = predicted_cell(record, "t4")
    return {cell.cell_id: a_record(metrics=dict.fromkeys(METRICS, peak), device="predicted:t4", **TINY)}


def test_what_was_measured_as_a_factor_of_the_prediction_is_that_far_off(tmp_path, predicting, cli):
    """The predicted run, with a tenth added to each number: the errors are that tenth, in every group."""
    from meftbench.plan.cell import Cell

    cells = [Cell.of(method, device="predicted:t4", **TINY) for method in ("lora", "meft1")]
    run = run_suite(a_suite(*cells, passes=("memory",), warmup=1, steps=1), tmp_path / "predicted")
    records = [
        replace(
            record,
            cell=record.cell | {"device": "cuda"},
            metrics={name: measured(round(record.metrics[name].value * 1.1)) for name in METRICS},
        )
        for record in run.records
    ]
    a_run(tmp_path / "measured", *records, environment=T4)

    code, out, err = cli("validate", tmp_path / "measured", "--json")
    found = json.loads(out)

    assert 0 == code
    assert "t4" == found["profile"]
    assert "predicting 2 cells on t4\n" == err
    assert all(row["signed"] == pytest.approx(1 / 1.1 - 1, abs=1e-5) for row in found["spreads"])
    assert all(row["worst"] == pytest.approx(1 - 1 / 1.1, abs=1e-5) for row in found["spreads"])
    assert 2 * len(METRICS) == len(found["errors"])
    assert {"lora", "meft1"} == {row["name"] for row in found["spreads"] if row["axis"] == "method"}


def test_the_protocol_of_the_run_is_the_predictions(tmp_path, predicting, cli):
    """Expandable segments reserve less than torch's default; padding cannot be predicted, and is refused by name."""
    cell = a_measured(10**8)
    shares = {}
    for name, protocol in (("default", {}), ("expandable", {"allocator": "expandable"})):
        a_run(tmp_path / name, cell, environment=T4, protocol={"warmup": 2, "steps": 5} | protocol)
        found = json.loads(cli("validate", tmp_path / name, "--json", "-q")[1])
        shares[name] = {row["metric"]: row["predicted"] for row in found["errors"]}

    assert shares["default"]["peak_allocated_bytes"] == shares["expandable"]["peak_allocated_bytes"]
    assert shares["default"]["peak_reserved_bytes"] != shares["expandable"]["peak_reserved_bytes"]

    a_run(tmp_path / "padded", cell, environment=T4, protocol={"padding": 0.25})

    code, out, err = cli("validate", tmp_path / "padded", "-q")

    assert (5, "", 1) == (code, out, len(err.splitlines()))
    assert "padding (0.25 of each sequence) cannot be predicted" in err


def test_repeats_are_one_cell_by_their_median():
    records = [a_measured(peak, repeat=repeat) for repeat, peak in enumerate((900, 1000, 5000))]

    found = errors(records, predicted_of(records[0], 1010), "t4")

    assert [(1000, 1010)] * len(METRICS) == [(error.measured, error.predicted) for error in found]


def test_it_is_kept_in_the_run_where_the_report_finds_it(tmp_path):
    """What is saved comes back; a run without is None; a damaged file is one line."""
    record = a_measured(1000)
    run = a_run(tmp_path / "run", record, environment=T4)
    found = Validation("t4", errors([record], predicted_of(record, 990), "t4"), ["m/full/b1/s1: error: no"])

    assert saved(run) is None
    save(run, found)
    assert found == saved(run)

    (run.path / "validation.json").write_text("{}")
    with pytest.raises(UserError, match=r"validation\.json: is damaged"):
        saved(run)


def test_a_predicted_run_says_what_predictions_were_held_against(tmp_path):
    """For each of its profiles, by name: those that were measured, and others."""
    records = [a_record(device=f"predicted:{name}") for name in ("t4", "a100-80gb")] + [a_record(device="counted")]

    found = predicted_for(a_run(tmp_path / "run", *records))

    assert ["a100-80gb", "t4"] == [*found]
    assert found["t4"].startswith("not validated on Tesla T4; rules held against published measurements on ")
    assert "held against published measurements of NVIDIA A100" in found["a100-80gb"]


def test_the_spread_has_the_median_the_worst_and_the_sign():
    """Of 10 % too little, 1 % and 2 % too much: median 2 %, worst 10 %, and the sign of the middle one."""
    records = [a_measured(1000, seed=seed) for seed in range(3)]
    predicted = {}
    for record, peak in zip(records, (900, 1010, 1020), strict=True):
        predicted |= predicted_of(record, peak)

    whole = spreads(errors(records, predicted, "t4"))[0]

    assert ("peak_allocated_bytes", "all", 3) == (whole.metric, whole.axis, whole.count)
    assert (0.02, 0.1, 0.01) == pytest.approx((whole.median, whole.worst, whole.signed))


def test_settings_in_full_are_the_same_cell():
    """A record has the method's defaults filled in, and a model's configuration under another name."""
    record = a_measured(1, method="lora+checkpoint", method_params={"rank": 4})

    cell = predicted_cell(record, "t4")

    assert ("predicted:t4", True, 4) == (cell.device, "checkpoint" in cell.levers.names(), cell.method_params["rank"])


@pytest.mark.parametrize(
    ("records", "environment", "arguments", "code", "said"),
    [
        ([a_record(metrics={"peak_allocated_bytes": 1})], T4, (), 5, "has no cell with measured"),
        ([a_record("oom")], T4, (), 5, "has no cell with measured"),
        ([a_measured(1)], {}, (), 2, "names no device in environment.json; choose one with --profile"),
        ([a_measured(1)], T4, ("--profile", "t5"), 2, "unknown profile 't5'"),
        ([a_measured(1)], {"gpus": {"devices": [{"name": "GeForce 256"}]}}, (), 2, "taken on GeForce 256, which has"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path, cli, records, environment, arguments, code, said):
    """Nothing measured: 5. A device that no profile is for: 2."""
    a_run(tmp_path / "run", *records, environment=environment)

    ended, out, err = cli("validate", tmp_path / "run", *arguments)

    assert (code, "", 1) == (ended, out, len(err.strip().splitlines()))
    assert said in err


def test_a_cell_that_cannot_be_predicted_is_told_with_its_reason(tmp_path, predicting, cli):
    """A head that looks for the end of each text; where it is the only one, nothing matched."""
    reading = a_measured(1000, model="bart-base@random")
    a_run(tmp_path / "reading", reading, environment=T4)

    code, out, err = cli("validate", tmp_path / "reading", "-q")

    assert (5, "") == (code, out)
    assert "looks at values, which a trace has not" in err

    a_run(tmp_path / "both", reading, a_measured(10**9), environment=T4)

    code, out, err = cli("validate", tmp_path / "both", "-q")

    assert (0, "") == (code, err)
    assert "not predicted: bart-base@random/lora/b2/s16: error: " in out
    assert "worst: bert-tiny@random/lora/b2/s16: 1,000,000,000 measured" in out
