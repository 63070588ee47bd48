"""`meftbench export`: a run for trackers and tables; a predicted step as torch's snapshot, and as a figure."""

from __future__ import annotations

import json
import math
import os
import pickle
from xml.etree import ElementTree

import pandas as pd
import pytest

from builders import a_record, a_run, measured, step_time
from meftbench.catalogue.profiles import find_profile
from meftbench.plan.cell import Cell
from meftbench.report.figures.timeline import timeline_picture

TINY = {"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16}
SHAPE = ("--batch-size", "2", "--sequence-length", "16", "--profile", "t4")


def test_the_snapshot_is_what_the_viewer_of_torch_reads(tmp_path, cli):
    """torch's own reader turns it into a page; the segments at the end are those of the allocator."""
    from torch.cuda import _memory_viz

    file = tmp_path / "new" / "cell.pickle"

    code, out, err = cli("export", "bert-tiny@random", "lora", *SHAPE, "-o", file)

    assert (0, f"{file}: drop it on https://pytorch.org/memory_viz\n") == (code, out)
    assert "predicting bert-tiny@random/lora/b2/s16 on Tesla T4" in err
    found = pickle.loads(file.read_bytes())
    assert {"alloc", "free_completed"} <= {entry["action"] for entry in found["device_traces"][0]}
    assert sum(segment["total_size"] for segment in found["segments"]) > 2**20
    assert "<html" in _memory_viz.trace_plot(found)


def test_the_figure_is_written_twice(tmp_path, cli):
    """As PNG and SVG beside each other, whatever ending the name has."""
    code, out, _ = cli(
        "export", "bert-tiny@random", "meft1", *SHAPE, "--format", "timeline", "-o", tmp_path / "step.png", "-q"
    )

    assert (0, f"{tmp_path / 'step.png'} and step.svg: written\n") == (code, out)
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "step.svg").read_text()


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact"])
def test_the_timeline_is_the_counters_step(method):
    """Peak, level between steps, gradients and the optimizer's state, to the byte; points change no peak."""
    from meftbench.prediction.predict import predict
    from meftbench.prediction.timeline import timeline_of

    found = predict(Cell.of(method, **TINY), find_profile("t4"))
    observed = found.measured[-1]

    for points in (10**6, 50):
        told = timeline_of(found.events, found.step_from, points)
        totals = [sum(level) for level in zip(*told["levels"].values(), strict=True)]
        assert observed.peak.total == max(totals)
        assert ["forward", "backward", "optimizer", "end"] == [name for name, _ in told["phases"]]
    at_peak = {kind: levels[totals.index(max(totals))] for kind, levels in told["levels"].items()}
    assert observed.peak.breakdown["optimizer"] == at_peak["optimizer"]
    assert observed.peak.breakdown["parameters"] == at_peak["parameters"]
    assert 52 >= len(told["at"])


def an_answer(method="lora", peak=12, label=None):
    """A step of three events: 4 MiB of parameters, and once `peak` with activations, MiB."""
    told = {
        "at": [0, 1, 2],
        "levels": {"parameters": [4, 4, 4], "activations": [0, peak - 4, 0], "gradients": [0, 0, 0]}
        | {name: [0] * 3 for name in ("buffers", "inputs", "other", "optimizer", "temporaries")},
        "phases": [["forward", 0], ["backward", 1], ["end", 2]],
    }
    told["levels"] = {kind: [level * 2**20 for level in levels] for kind, levels in told["levels"].items()}
    label = label or f"m/{method}/b1/s1"
    return {"label": label, "method": method, "device": "a GPU", "peak_allocated_bytes": peak * 2**20, "timeline": told}


def test_the_figure_stacks_what_is_alive():
    """Categories without bytes are left out, the peak and phases are named; the legend is the stack, from the top."""
    picture = timeline_picture([an_answer()])

    (ax,) = picture.figure.axes
    assert ["activations", "parameters"] == [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"forward", "backward"} < {text.get_text() for text in ax.texts}
    assert "m/lora/b1/s1, on a GPU, predicted" in picture.alt


def test_methods_stand_side_by_side_on_one_axis_of_bytes():
    """A panel a method, named by it alone where nothing else differs; the limits are those of the largest."""
    picture = timeline_picture(
        [an_answer("full", 40), an_answer("lora"), an_answer("meft1", 20), an_answer("meft3", 9)]
    )

    axes = picture.figure.axes
    assert ["full", "lora", "meft1", "meft3"] == [ax.get_title(loc="left") for ax in axes]
    assert [pytest.approx((0, 44))] * 4 == [ax.get_ylim() for ax in axes]
    assert [False, True, False, False] == [ax.get_legend() is not None for ax in axes]
    assert "m/b1/s1" in picture.title
    assert "full 40.0 MiB; lora 12.0 MiB" in picture.alt


def test_cells_that_differ_in_more_are_named_in_full():
    labels = ["m/lora/b1/s1", "m/lora/b2/s1"]

    picture = timeline_picture([an_answer(label=label) for label in labels])

    assert labels == [ax.get_title(loc="left") for ax in picture.figure.axes]


def test_several_methods_go_into_one_figure(tmp_path, cli):
    code, out, err = cli(
        "export", "bert-tiny@random", "full", "lora", *SHAPE, "--format", "timeline", "-o", tmp_path / "two"
    )

    assert (0, f"{tmp_path / 'two.png'} and two.svg: written\n") == (code, out)
    assert 2 == len([line for line in err.splitlines() if line.startswith("predicting ")])


# --- of a run ---

PEAK, TIME, SPEED = "peak_allocated_bytes", "step_time_s", "tokens_per_s"


@pytest.fixture
def run(tmp_path):
    """Two cells that ended ok (one of them twice), one out of memory, one with an infinite number."""
    fine = {PEAK: measured(1000), TIME: step_time(0.5), SPEED: measured(64.0)}
    records = [
        a_record(metrics=fine, method="lora"),
        a_record(metrics=fine | {PEAK: measured(1200)}, method="lora", repeat=1),
        a_record("oom", method="full", status_detail={"message": "no room"}),
        a_record(metrics={PEAK: 2000, TIME: measured(math.inf)}, method="meft1"),
    ]
    return a_run(tmp_path / "run", *records).path


LORA, MEFT1 = "bert-base@random/lora/b8/s128", "bert-base@random/meft1/b8/s128"


def test_bencher_has_value_and_bounds(cli, run):
    """The median over repeats and their spread; what failed, and what is infinite, has no number."""
    code, out, _ = cli("export", run, "--format", "bmf")
    found = json.loads(out)

    assert 0 == code
    assert [LORA, MEFT1] == list(found)
    assert {"value": 1100, "lower_value": 1000, "upper_value": 1200} == found[LORA][PEAK]
    assert [PEAK] == list(found[MEFT1])


def test_the_action_reads_what_is_to_fall_and_what_is_to_rise_from_two_files(cli, run, tmp_path):
    code, out, _ = cli("export", run, "--format", "github-action-benchmark", "-o", tmp_path / "b" / "it.json")
    smaller, bigger = (json.loads((tmp_path / "b" / f"it-{side}.json").read_text()) for side in ("smaller", "bigger"))

    assert 0 == code
    assert "it-smaller.json: written\n  tool: customSmallerIsBetter" in out
    assert [f"{LORA}: {SPEED}"] == [entry["name"] for entry in bigger]
    assert [f"{LORA}: {PEAK}", f"{LORA}: {TIME}", f"{MEFT1}: {PEAK}"] == [entry["name"] for entry in smaller]
    first = smaller[0]
    assert (1100, "byte", "1000 to 1200") == (first["value"], first["unit"], first["range"])
    assert {"name", "unit", "value", "extra"} == set(smaller[2])


def test_pytorchs_database_has_a_value_a_repeat(cli, run):
    code, out, _ = cli("export", run, "--format", "pytorch-v3", "--metric", PEAK)
    rows = json.loads(out)

    assert 0 == code
    assert [[1000, 1200], [2000]] == [row["metric"]["benchmark_values"] for row in rows]
    assert ("fp32", "training") == (rows[0]["benchmark"]["dtype"], rows[0]["benchmark"]["mode"])
    assert "bert-base@random" == rows[0]["model"]["name"]


def test_junit_has_a_case_a_cell(cli, run):
    """Out of memory is a failure; numbers are properties."""
    code, out, _ = cli("export", run, "--format", "junit")
    suite = ElementTree.fromstring(out)

    assert 0 == code
    assert ("3", "1", "0", "0") == tuple(suite.attrib[name] for name in ("tests", "failures", "errors", "skipped"))
    assert "oom: no room" == suite.find(".//failure").attrib["message"]
    assert "1100.0 byte (measured)" == suite.find(f".//property[@name='{PEAK}']").attrib["value"]


def test_the_table_as_csv_and_parquet_is_the_reports(cli, run, tmp_path):
    """The same rows; in Parquet numbers are numbers and know their unit."""
    code, out, _ = cli("export", run)
    (tmp_path / "t.csv").write_text(out)
    cli("export", run, "--format", "parquet", "-o", tmp_path / "t.parquet")
    text, typed = pd.read_csv(tmp_path / "t.csv"), pd.read_parquet(tmp_path / "t.parquet")

    assert 0 == code
    assert [1100, None, 2000] == [None if pd.isna(v) else v for v in text[f"{PEAK} [byte]"]]
    assert [1100, None, 2000] == [None if pd.isna(v) else v for v in typed[PEAK]]
    assert list(text["label"]) == list(typed["label"])
    assert pd.api.types.is_numeric_dtype(typed[PEAK])
    assert "byte" == typed.attrs["units"][PEAK]


def test_json_has_the_records_as_they_are(cli, run):
    code, out, _ = cli("export", run, "--format", "json")
    found = json.loads(out)

    assert 0 == code
    assert ["ok", "ok", "oom", "ok"] == [record["status"] for record in found["records"]]
    assert "Infinity" == found["records"][3]["metrics"][TIME]["value"]
    assert "toy" == found["suite"]["name"]


def test_cells_are_chosen_by_their_label(cli, run):
    code, out, _ = cli("export", run, "*/meft1/*", "--format", "bmf")

    assert (0, [MEFT1]) == (code, list(json.loads(out)))


def test_a_cell_of_a_run_is_predicted_again(cli, tmp_path):
    """On the device it was measured on, with the run's allocator."""
    run = a_run(
        tmp_path / "run",
        a_record(method="lora", device="cuda", **TINY),
        environment={"gpus": {"devices": [{"name": find_profile("t4").device}]}},
        protocol={"warmup": 1, "allocator": "expandable"},
    ).path

    code, out, err = cli("export", run, "--format", "memory_viz", "-o", tmp_path / "it.pickle")

    assert (0, f"{tmp_path / 'it.pickle'}: drop it on https://pytorch.org/memory_viz\n") == (code, out)
    assert "on Tesla T4" in err
    found = pickle.loads((tmp_path / "it.pickle").read_bytes())
    assert all(segment.get("is_expandable") for segment in found["segments"])


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("RUN", "--format", "memory_viz"), 2, "3 cells are named, and memory_viz holds one"),
        (("RUN", "nothing", "--format", "csv"), 5, "nothing"),
        (("RUN", "--batch-size", "2"), 2, "is a run, and its cells are as they are; leave --batch-size out"),
        (("RUN", "--format", "bmf", "--metric", "peak"), 2, "--metric: unknown metric 'peak'"),
        (("RUN", "--format", "csv", "-o", "RUN/suite.yaml/x"), 2, "choose another with -o/--output"),
        (("RUN", "--format", "parquet", "-o", "/dev/full"), 2, "No space left on device"),
        (("RUN", "--format", "csv", "-o", "/dev/full"), 2, "/dev/full: cannot be written"),
        (("bert-tiny@random", "--format", "csv"), 2, "is no run, and --format csv is of a run"),
        (("bert-tiny@random",), 2, "is no run, and no METHOD is named"),
        (("bert-tiny@random", "lora"), 2, "add --batch-size and --sequence-length"),
        (("bert-tiny@random", "lora", "full", *SHAPE), 2, "2 cells are named, and memory_viz holds one"),
        (("bert-tiny@random", "lora", *SHAPE, "-o", "RUN/suite.yaml/x"), 2, "choose another with -o/--output"),
        (("bert-tiny@random", "lora", *SHAPE, "-o", "/dev/full", "-q"), 2, "/dev/full: cannot be written (No space"),
    ],
)
def test_what_it_cannot_do_is_one_line(cli, run, given, code, said):
    ended, out, err = cli("export", *(str(word).replace("RUN", str(run)) for word in given))

    assert (code, "", 1) == (ended, out, len(err.strip().splitlines()))
    assert said in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(cli, run, tmp_path):
    (tmp_path / "kept").mkdir(mode=0o500)

    for given in (("--format", "csv", "-o", "kept/a.csv"), ("--format", "bmf", "-o", "kept/b/a.json")):
        code, _, err = cli("export", run, *given)
        assert (2, 1) == (code, len(err.splitlines()))
        assert "choose another with -o/--output" in err


@pytest.mark.parametrize(
    ("rows", "message", "color"),
    [
        ([f"{PEAK}, max: 5"], "1 budget held", "brightgreen"),
        ([f"{PEAK}, max: 5", "ooms, max: 0"], "1 of 2 budgets over", "red"),
        ([f"{PEAK}, max: 5", "ooms, max: 2, warn: 0"], "2 budgets held, 1 near or waived", "yellow"),
        ([f"{PEAK}, max: 9, environment: h200"], "1 of 1 budget not measured", "orange"),
        (["alloc_retries, max: 0, missing: ignore"], "1 of 1 budget not measured", "orange"),
    ],
)
def test_a_badge_says_whether_budgets_hold(tmp_path, cli, rows, message, color):
    """The four keys that shields.io reads."""
    lines = [f"  - {{match: '*', metric: {row}}}" for row in rows]
    (tmp_path / "b.yaml").write_text("\n".join(["schema: 1", "budgets:", *lines]))
    a_run(tmp_path / "run", a_record(metrics={PEAK: 5, "ooms": 1}), budgets=str(tmp_path / "b.yaml"))

    code, out, _ = cli("export", tmp_path / "run", "--format", "badge")

    assert 0 == code
    assert {"schemaVersion": 1, "label": "memory", "message": message, "color": color} == json.loads(out)


def test_a_badge_of_a_run_without_budgets(tmp_path, cli):
    a_run(tmp_path / "run", a_record(metrics={PEAK: 5}))

    code, out, err = cli("export", tmp_path / "run", "--format", "badge", "-o", tmp_path / "badge.json")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert "its suite names no budgets; write `budgets: FILE` into the suite, and run it" in err
    assert not (tmp_path / "badge.json").exists()


@pytest.mark.parametrize("size", [2**63, -(2**63) - 1, 10**299], ids=["2**63", "-2**63 - 1", "10**299"])
def test_numbers_beyond_64_bits_are_floating_point_in_parquet(cli, tmp_path, size):
    """Records may hold them, as values and as sizes; beside them smaller ones, to the last digit that fits."""
    records = [a_record(metrics={PEAK: size}, batch_size=abs(size)), a_record(metrics={PEAK: 5}, method="lora")]
    run = a_run(tmp_path / "run", *records).path

    code, _, err = cli("export", run, "--format", "parquet", "-o", tmp_path / "t.parquet")

    assert 0 == code, err
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert [float(size), 5.0] == list(table[PEAK])
    assert [float(abs(size)), 8.0] == list(table["batch_size"])
