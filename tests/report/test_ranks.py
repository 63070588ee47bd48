"""Cells whose step was taken in several ranks: every view says so, and which numbers are those of one rank."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from builders import MiB, a_record, a_run, counted, measured, step_time
from meftbench.records.record import Metric
from meftbench.report.render.markdown import markdown
from meftbench.report.render.notebook import run_html
from meftbench.report.render.terminal import print_summary
from meftbench.report.results import frame_of, groups
from meftbench.report.views.answer import answers, headline
from meftbench.report.views.detail import sections, value_text
from meftbench.report.views.endings import shared_cores

DDP, FSDP2 = ({"world_size": 2, "parallelism": name} for name in ("ddp", "fsdp2"))


def a_cell_of(method, peak, waited=0.0, **fields):
    """A cell with a peak in MiB, the threads of which waited for cores for a share of the time."""
    metrics = {"peak_allocated_bytes": counted(peak * MiB), "cpu_wait_share": measured(waited)}
    return a_record(method=method, metrics=metrics | {"step_time_s": step_time(0.5)}, **fields)


def printed(run):
    console = Console(file=io.StringIO(), width=200)
    print_summary(run, console)
    return console.file.getvalue()


def test_a_run_of_one_number_of_ranks_says_how_many_and_how(tmp_path):
    """In the title of its table, and in the answer, whose peak is that of a rank."""
    run = a_run(tmp_path / "run", a_cell_of("lora", 90, **DDP), a_cell_of("full", 200, **DDP))
    frame = frame_of(run)

    assert printed(run).startswith("bert-base@random, 2 ranks, ddp\n")
    said = headline(frame)[0]
    assert said.startswith("at batch 8 × 128 tokens in 2 ranks under ddp, lora holds least, a peak of 90.0 MiB")
    assert "90.0 MiB (counted) in a rank" in said
    assert [answer.title for answer in answers(frame)] == [
        "batch 8 × 128 tokens: bert-base@random, 2 ranks, ddp, counted, fp32"
    ]


def test_a_failed_run_of_ranks_says_how_many_too(tmp_path):
    """Where no number was taken."""
    run = a_run(tmp_path / "run", a_record("error", method="full", **FSDP2))

    assert printed(run).startswith("bert-base@random, 2 ranks, fsdp2\n")


def test_one_process_is_no_rank(tmp_path):
    """Beside ranks, of which the answer begins with those of which more cells ended."""
    records = [a_cell_of("lora", 90, **DDP), a_cell_of("full", 200, **DDP), a_cell_of("full", 150)]
    said = headline(frame_of(a_run(tmp_path / "run", *records)))

    assert "in one process full holds least, 150.0 MiB (counted)" == said[1]
    alone = a_run(tmp_path / "alone", a_cell_of("full", 150))
    assert "rank" not in " ".join(headline(frame_of(alone))) + printed(alone)
    assert ["bert-base@random"] == [group.title for group in groups(frame_of(alone))]


@pytest.mark.parametrize("cells", [1, 2])
def test_a_time_that_waited_for_cores_is_said_to_have_waited(tmp_path, cells):
    """Of one cell as of several."""
    records = [a_cell_of("lora", 90, waited=0.5), a_cell_of("full", 200)][:cells]
    (answer,) = answers(frame_of(a_run(tmp_path / "run", *records)))

    assert ", while other processes held the cores" in answer.sentences[0]
    quiet = a_run(tmp_path / "quiet", *[a_cell_of("lora", 90), a_cell_of("full", 200)][:cells])
    assert "held the cores" not in answers(frame_of(quiet))[0].sentences[0]


def test_the_table_in_markdown_says_what_the_page_says(tmp_path):
    """Not to rank across processes and ranks, and that cores were shared; one process has no parallelism."""
    records = [a_cell_of("full", 200, waited=0.5), a_cell_of("full", 150, **DDP), a_cell_of("lora", 90, **FSDP2)]
    run = a_run(tmp_path / "run", *records)
    text = markdown([run], frame_of(run))

    assert "The cells differ in more than method and shape: do not rank across those settings." in text
    assert "1 of 3 cells were timed while other processes held the cores (they waited up to 50%" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| full", "| lora"))]
    assert [("1", "none"), ("2", "ddp"), ("2", "fsdp2")] == [tuple(row[3:5]) for row in rows]
    assert "default" not in run_html(run)
    alike = a_run(tmp_path / "alike", a_cell_of("full", 200), a_cell_of("lora", 90))
    assert "do not rank" not in markdown([alike], frame_of(alike))
    assert "held the cores" not in markdown([alike], frame_of(alike))


def test_of_several_runs_the_one_whose_cores_were_shared_is_named(tmp_path):
    """In Markdown."""
    names = {"busy": 0.5, "quiet": 0.0}
    runs = [a_run(tmp_path / name, a_cell_of("full", 200, waited=share), name=name) for name, share in names.items()]

    text = markdown(runs, frame_of(runs))

    assert "busy: 1 of 1 cells were timed while" in text
    assert "quiet: 1 of 1" not in text


def test_a_record_says_the_bytes_of_each_rank():
    """Rank 0 first."""
    record = a_record(metrics={"peak_memory_by_rank": counted([96 * MiB, 97 * MiB])}, **DDP)

    rows = {name: value for section in sections(record) for name, value, _ in section.rows}

    assert "rank 0 96.0 MiB, rank 1 97.0 MiB (counted)" == rows["peak_memory_by_rank"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("peak_memory_by_rank", ["a", {}], "2 entries (measured)"),
        ("peak_memory_by_rank", [], "0 entries (measured)"),
        ("throttle_reasons", ["sw_power_cap", "hw_slowdown"], "sw_power_cap, hw_slowdown (measured)"),
        ("reconstruction_rel", [[0.0, 0.0]], "1 layer (measured)"),
        ("learning_curve", [[1, 2.0, 0.5]], "1 evaluation (measured)"),
    ],
)
def test_other_lists_are_words_or_a_count(name, value, said):
    """Whatever a record holds."""
    assert said == value_text(name, Metric(value, "measured"))


def test_ranks_that_outnumber_the_cores_are_told_so(tmp_path):
    """No quiet machine would help them."""
    host = {"host": {"cores": 2}}
    records = [a_cell_of("full", 200, waited=0.5), a_cell_of("full", 150, waited=0.9, **DDP | {"world_size": 4})]
    run = a_run(tmp_path / "run", *records, environment=host)

    others, own = shared_cores(run)

    assert others.startswith("1 of 2 cells were timed while other processes held the cores (they waited up to 50%")
    assert own.startswith("1 of 2 cells were timed with more ranks and threads than there were cores (they waited up")
    assert "on more cores" in own
