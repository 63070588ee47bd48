"""The table on the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from builders import a_measured_cell, a_record, a_run, a_sweep, measured
from meftbench.catalogue.metrics import METRICS, Kind
from meftbench.records.store import load_run
from meftbench.report.columns import count, error
from meftbench.report.render import terminal
from meftbench.report.render.terminal import print_summary
from meftbench.report.results import frame_of, rows_of

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def printed(run, width=80):
    stream = io.StringIO()
    print_summary(run, Console(file=stream, width=width))
    return stream.getvalue()


GOLDEN = """\
bert-base@random
memory counted, time measured, errors measured; compared at equal batch,
micro-batch and length
batch × tokens,    activation  % of  peak step tokens recon. gradient
method                    MiB  full   MiB   ms     /s  error    error trained
1 × 128
 full                    76.7 100.0 1,831 16.0  8,000      -        -  109.0M
 lora+checkpoint         12.3  16.0 494.4 20.8  6,154      -        -  600.0k
 houlsby                  oom
 meft1                   8.77  11.4 490.8 20.8  6,154   3e-3     6e-3  600.0k
 meft3                   7.88  10.3 489.9 20.8  6,154   3.07     6.14  600.0k
  coupling=centred
  output=last
5 cells: 4 ok, 1 oom
bert-base@random/houlsby/b1/s128: oom (asked for 12.0 GiB; needs more)
"""


def test_the_table_reads_well_at_80_columns(tmp_path):
    """Sources are said, failures have their place and their reason, a long label does not push the numbers away."""
    records = a_sweep(["full", "lora+checkpoint", "meft1"], (1,), (128,))
    records.append(a_measured_cell("meft3", 1, method_params={"coupling": "centred", "output": "last"}))
    records.append(
        a_record("oom", method="houlsby", batch_size=1,
                 status_detail={"requested_bytes": 12 * 2**30, "message": "needs more"})
    )  # fmt: skip

    assert GOLDEN == "".join(line.rstrip() + "\n" for line in printed(a_run(tmp_path, *records)).splitlines())


def test_settings_that_differ_are_tables_of_their_own(tmp_path):
    """Cells are not ranked across precision, and the reader is told."""
    text = printed(a_run(tmp_path, *a_sweep(["full"], (1,), (16,)), *a_sweep(["full"], (1,), (16,), precision="bf16")))

    assert "bert-base@random, fp32\n" in text
    assert "bert-base@random, bf16\n" in text
    assert "do not rank across them" in text


def test_two_sources_in_one_column_are_marked_at_each_value(tmp_path):
    """Measured and counted bytes never stand unmarked in one column."""
    other = a_measured_cell("lora", 1, metrics={"activation_peak_bytes": measured(2**20)})

    text = printed(a_run(tmp_path, a_measured_cell("full", 1), other))

    assert "memory counted and measured" in text
    assert "76.7 c" in text
    assert "1.00 m" in text
    assert "m measured, c counted" in text


def test_a_run_without_a_finished_cell_says_so(tmp_path):
    """An empty table would look like a result."""
    assert "no cell has finished\n" == printed(a_run(tmp_path))


def test_errors_tell_zero_from_small_from_not_taken():
    """0 is exact; what is not finite is shown as such."""
    assert ["0", "3e-8", "0.14", "330", "9e8", "∞", "NaN", "-"] == [
        error(v) for v in (0.0, 3e-8, 0.14, 330.0, 9e8, float("inf"), float("nan"), None)
    ]


def test_counts_are_short():
    """A parameter count in seven characters."""
    assert ["-", "9,999", "12.3k", "109.5M", "6.7G"] == [count(v) for v in (None, 9999, 12_345, 109_500_000, 6.7e9)]


def test_a_start_that_is_destroyed_is_seen_at_once(tmp_path):
    """Loss before training beside that of the pre-trained model; classifiers have no such column (see GOLDEN)."""
    lora, meft = ({"pretrained_loss": measured(3.084), "starting_loss": measured(loss)} for loss in (3.084, 15.257))
    run = a_run(tmp_path, a_measured_cell("lora", metrics=lora), a_measured_cell("meft1", metrics=meft))

    text = printed(run, width=100)

    assert "start loss" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(" ")}
    assert "3.08 (3.08)" in rows["lora"]
    assert "15.26 (3.08)" in rows["meft1"]
    assert "loss measured" in text


def test_gradients_within_the_activation_memory_have_a_column(tmp_path):
    """Of the activation memory, in its unit; "-" in records of before."""
    new = a_measured_cell("meft1", metrics={"activation_gradients_bytes": 17 * 2**20})

    text = printed(a_run(tmp_path, a_measured_cell("lora"), new), width=100)

    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(" ")}
    assert ["70.2", "17.0"] == rows["meft1"][1:3]
    assert ["450.0", "-"] == rows["lora"][1:3]


def test_a_narrow_terminal_leaves_out_what_is_said_twice(tmp_path):
    """tokens/s is the step time again; the reader is told, and no number is cut."""
    metrics = {
        "activation_gradients_bytes": 17 * 2**20,
        "pretrained_loss": measured(3.08),
        "starting_loss": measured(15),
    }
    run = a_run(tmp_path, a_measured_cell("full"), a_measured_cell("meft1", metrics=metrics))

    narrow, wide = printed(run, 80), printed(run, 110)

    assert "no room at this width for tokens/s, % of full, peak" in " ".join(narrow.split())
    assert "15.00 (3.08)" in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    assert "no room" not in wide


@pytest.mark.parametrize("run", ["minilm-cpu", "smollm2-cpu", "quality-minilm", "quality-qa-minilm"])
def test_no_number_is_cut_whatever_the_width(run):
    """A figure of a narrow table stands in the wide one: 2e-6 is never shown as 2e-."""
    loaded = load_run(REPORTS / run)

    def figures(columns):
        return re.findall(r"(?<=\s)[-+]?[\d.,]+[\w%+-]*(?=\s)", printed(loaded, columns))

    # Of scores there are two tables: short figures up to some width, and whole ones.
    uncut = {*figures(119), *figures(250)}
    for width in (32, 40, 50, 60, 70, 80, 90, 110):
        shown = figures(width)
        assert 20 < len(shown), width
        assert [] == [figure for figure in shown if figure not in uncut], width


@pytest.mark.parametrize("run", ["minilm-cpu", "quality-images"])
@pytest.mark.parametrize("width", [10, 20, 40])
def test_a_row_says_its_method_whatever_the_width(run, width):
    """Eight characters a line are the least that the methods' column is given; the numbers stand beside it."""
    loaded = load_run(REPORTS / run)
    text = printed(loaded, width)

    for method in {record.cell["method"] for record in loaded.records if record.status == "ok"}:
        begin = method[:7]
        assert any(re.match(rf" ?{re.escape(begin)}.*\d", line) for line in text.splitlines())


@pytest.mark.parametrize("width", [16, 20, 30, 80])
def test_a_setting_says_its_number_whatever_the_width(width):
    """`tiles=16` is never read as `tiles=1`: it may break before its value, not within it."""
    settings = {"tiles=16", "tiles=4", "rank=59"}
    text = printed(load_run(REPORTS / "minilm-cpu"), width)

    for setting in settings:
        name, value = setting.split("=")
        assert re.search(rf"{name}=\s*{value}\b", text)
    assert not re.search(r"tiles=\s*1\b", text)


def test_a_metric_that_is_newer_than_the_run_is_not_there(monkeypatch, tmp_path):
    """A stranger's column over records from before it: as a metric that a cell has not, everywhere it is shown."""
    monkeypatch.setitem(METRICS, "swap_peak_bytes", Kind("byte", "lower", "of a stranger"))
    monkeypatch.setattr(terminal, "SHOWN", (*terminal.SHOWN, "swap_peak_bytes"))
    run = load_run(REPORTS / "minilm-cpu")
    (row, *_) = rows_of(frame_of(run))

    assert row["swap_peak_bytes"] is None is row["swap_peak_bytes_source"]
    with pytest.raises(KeyError):
        row["swap_peek_bytes"]
    assert printed(run) == printed(load_run(REPORTS / "minilm-cpu"))


def test_levers_with_settings_stand_whole(tmp_path):
    """On 80 columns: the longest name of a lever, and settings of one below its name."""
    method = "full+checkpoint(keep=attention)+optimizer_in_backward"
    run = a_run(tmp_path, a_record(method=method, metrics={"peak_allocated_bytes": 2**20}))

    lines = [line.split("  1.0")[0].rstrip() for line in printed(run, 80).splitlines()]

    first = next(number for number, line in enumerate(lines) if line.startswith(" full"))
    assert "   +checkpoint" == lines[first + 1]
    assert "    keep=attention" == lines[first + 2]
    assert "   +optimizer_in_backward" == lines[first + 3]


def test_cells_of_several_processes_have_a_table_of_their_own(tmp_path):
    """Whose title says how many, and how they share a step."""
    ranks = a_measured_cell(world_size=2, parallelism="fsdp2")

    lines = printed(a_run(tmp_path, a_measured_cell(), ranks)).splitlines()

    assert "bert-base@random, one process, no parallelism" in lines
    assert "bert-base@random, 2 ranks, fsdp2" in lines
