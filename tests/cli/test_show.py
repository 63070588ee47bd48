"""`meftbench show`: a run, a cell."""

from __future__ import annotations

import json

import pytest

from builders import a_measured_cell, a_record, a_run, measured, tear_last_line


@pytest.fixture
def run(tmp_path):
    """A finished cell and one that failed."""
    names = ("peak_requested_bytes", "peak_active_bytes", "peak_reserved_bytes", "process_device_bytes")
    ladder = {name: measured(mib * 2**20) for mib, name in enumerate(names, start=600)}
    failed = a_record(
        "error", method="lora", status_detail={"type": "ValueError", "message": "no", "traceback": "File x"}
    )
    return a_run(tmp_path / "run", a_measured_cell("meft1", metrics=ladder), failed)


def test_a_run_is_its_table(cli, run):
    """Results on stdout."""
    code, out, err = cli("show", run.path)

    assert (0, "") == (code, err)
    assert "2 cells: 1 ok, 1 error\nbert-base@random/lora/b8/s128: error (no)\n" in out


def test_a_cell_has_the_ladder_with_a_use_for_each_step(cli, run, monkeypatch):
    """Which number is "the memory": in order, each with what it is good for."""
    monkeypatch.setenv("COLUMNS", "200")

    _, out, _ = cli("show", run.path, run.records[0].cell_id[:6])

    steps = ("peak_requested_bytes", "peak_active_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
             "process_device_bytes")  # fmt: skip
    places = [out.index(name) for name in steps]
    assert places == sorted(places)
    for said in (
        "for comparing methods",
        "of the peak",
        "optimizer state at the peak",
        "backward",
        "layer 0",
        "again:",
    ):
        assert said in out
    assert "600.0 MiB (measured)" in out


def test_a_glob_on_the_label_names_cells(cli, run):
    """As in budgets."""
    _, out, _ = cli("show", run.path, "*/lora/*")

    assert "error: no (type ValueError)" in out
    assert "File x" not in out


def test_the_traceback_is_shown_when_asked_for(cli, run):
    """Not by default."""
    assert "File x" in cli("show", run.path, "*/lora/*", "--traceback")[1]


@pytest.fixture
def sweep(tmp_path):
    """Two methods at two shapes, and a third method at 25 shapes."""
    shapes = [("lora", 4), ("lora", 8), ("lora+checkpoint", 4)] + [("full", size) for size in range(1, 26)]
    return a_run(tmp_path / "run", *(a_record(method=method, batch_size=size) for method, size in shapes))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lora/b8/s128", "bert-base@random/lora/b8/s128"),
        ("lora+checkpoint", "bert-base@random/lora+checkpoint/b4/s128"),
        ("lora+checkpoint/b4", "bert-base@random/lora+checkpoint/b4/s128"),
        ("bert-base@random/full/b1/s128", "bert-base@random/full/b1/s128"),
        ("full/b1", "bert-base@random/full/b1/s128"),  # not b10 to b19
    ],
)
def test_a_cell_is_named_by_method_and_shape(cli, sweep, name, label):
    """Without the model, whose configuration may make labels long."""
    (line,) = cli("show", sweep.path, name, "--json")[1].splitlines()

    assert label == json.loads(line)["cell"]["label"]


def test_several_cells_are_listed_for_a_choice(cli, sweep):
    """None is taken silently, and no other form of output takes one either."""
    code, out, err = cli("show", sweep.path, "lora")
    first, second, *rest = err.splitlines()

    assert (5, "") == (code, out)
    of_lora = zip(sweep.records, ("b4", "b8"), strict=False)
    assert [f"{record.cell_id}  ok  bert-base@random/lora/{size}/s128" for record, size in of_lora] == [first, second]
    cure = "name one by its cell_id or label, or all of them by a glob: '*/lora/*'"
    assert [f"meftbench: {sweep.path}: 2 cells are 'lora'; {cure}"] == rest
    assert (5, "") == cli("show", sweep.path, "lora", "--json")[:2]
    assert f"\nand 5 more (`meftbench show {sweep.path} --cells` lists all)\n" in cli("show", sweep.path, "full")[2]
    assert 2 == len(cli("show", sweep.path, "*/lora/*", "--json")[1].splitlines())


def test_all_cells_are_listed_when_asked_for(cli, run):
    """What names them, and how each ended."""
    ids = [record.cell_id for record in run.records]
    labels = [record.label for record in run.records]
    lines = cli("show", run.path, "--cells")[1].splitlines()
    facts = [json.loads(line) for line in cli("show", run.path, "--cells", "--json")[1].splitlines()]

    assert [f"{ids[0]}  ok     {labels[0]}", f"{ids[1]}  error  {labels[1]}"] == lines
    assert [{"label": labels[0], "cell_id": ids[0], "status": "ok"},
            {"label": labels[1], "cell_id": ids[1], "status": "error"}] == facts  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--json",), ("--cells",), ("lora",)])
def test_a_run_in_which_no_cell_has_finished_exits_5(cli, tmp_path, more):
    """One line."""
    empty = a_run(tmp_path / "empty")

    code, out, err = cli("show", empty.path, *more)

    assert (5, "") == (code, out)
    assert f"meftbench: {empty.path}: no cell has finished; `meftbench run` with --resume takes it up\n" == err


def test_json_is_a_record_a_line(cli, run):
    """As stored."""
    lines = cli("show", run.path, "--json")[1].splitlines()

    assert [record.to_json() for record in run.records] == [json.loads(line) for line in lines]


def test_an_unknown_cell_exits_5_with_the_nearest(cli, run):
    """The label that was probably meant."""
    code, out, err = cli("show", run.path, "bert-base@random/lora/b8/s129")

    assert (5, "") == (code, out)
    assert "did you mean 'bert-base@random/lora/b8/s128'" in err


def test_a_torn_last_line_is_said_on_stderr(cli, run):
    """The finished cells are shown all the same."""
    tear_last_line(run)

    code, out, err = cli("show", run.path)

    assert 0 == code
    assert "2 cells" in out
    assert "the last line is cut off" in err


def test_labels_with_brackets_are_text(cli, tmp_path):
    """Not markup of the terminal."""
    run = a_run(
        tmp_path / "run", a_measured_cell("lora", method_params={"targets": ["query"]}, observed={"note": "[red]"})
    )

    assert "targets=['query']" in cli("show", run.path)[1]
