"""Scores for people: the best rate of each method, its spread over seeds, and what it cost."""

import io

import pytest
from rich.console import Console

from builders import a_measured_cell, a_run, counted
from meftbench.report.render.report import write_report
from meftbench.report.render.terminal import print_summary
from meftbench.report.results import frame_of
from meftbench.report.views.detail import sections
from meftbench.report.views.endings import failures
from meftbench.report.views.scores import results, tables
from scored_runs import METHODS, a_score, scored_run


@pytest.fixture
def frame(tmp_path):
    """The frame of a run of some records."""
    return lambda *records: frame_of(a_run(tmp_path / "run", *records))


@pytest.fixture
def printed(tmp_path):
    """What is printed of a run of some records, on a terminal so wide."""

    def text(*records, width=80):
        stream = io.StringIO()
        print_summary(a_run(tmp_path / "run", *records), Console(file=stream, width=width))
        return stream.getvalue()

    return text


# --- results ---


def test_the_rate_that_is_best_on_validation(frame):
    """With its mean and standard deviation over the seeds; every rate that was tried is named."""
    records = [a_score(score=score, rate=1e-3, seed=seed) for seed, score in enumerate((0.70, 0.72, 0.74))]
    records += [a_score(score=0.60, rate=1e-2, seed=seed) for seed in range(3)]

    (result,) = results(frame(*records))

    assert (1e-3, [0, 1, 2], "0.720 ± 0.020") == (result.learning_rate, result.seeds, result.score.said())
    assert {1e-3: pytest.approx(0.72), 1e-2: pytest.approx(0.60)} == result.rates


def test_a_rate_of_one_lucky_seed_is_not_the_best(frame):
    """Where only the first seed tried them all, the rate that the others took is what counts."""
    records = [a_score(score=0.9, rate=1e-2), *(a_score(score=0.7, seed=seed) for seed in (0, 1))]

    (result,) = results(frame(*records))

    assert (1e-3, 2) == (result.learning_rate, len(result.rows))


def test_one_seed_has_no_deviation(frame):
    (result,) = results(frame(a_score(score=0.5)))

    assert (None, "0.500") == (result.score.deviation, result.score.said())


def test_what_is_not_the_same_method(frame):
    """Another precision, length or training is another row; the seed and the rate are not."""
    others = [a_score(seed=1), a_score(rate=1.0), a_score(precision="bf16"), a_score(sequence_length=16)]

    found = results(frame(a_score(), *others, a_score(training={"ordinary": True})))

    assert 4 == len(found)
    assert ["", "ordinary"] == sorted({result.own for result in found})


@pytest.mark.parametrize("task", ["rte", "./of/my, own=task/lr1"])
def test_rates_of_a_task_whose_name_is_a_path(frame, task):
    """Its slashes and commas are no borders between settings."""
    (result,) = results(frame(a_score(task=task, rate=1e-3), a_score(task=task, rate=1e-2)))

    assert (task, 2) == (result.first["task"], len(result.rates))


def test_a_finished_training_without_a_score_has_a_row(frame, tmp_path):
    """Its memory and time are known; why there is no score is said among what went wrong, as is a failure."""
    run = a_run(tmp_path / "other", a_score(score=None), a_score(seed=1, status="error"), a_score("lora"))

    found = results(frame_of(run))

    assert [("full", "undefined"), ("lora", "0.700")] == [(result.method, result.said_score()) for result in found]
    (table,) = tables(found)
    assert ("full", "undefined", "96.0 MiB (counted)") == table.lines[0][:3]
    assert ("full", "undefined*") == table.narrow_lines[0][:2]
    assert "*: full has no score of seed 0" in table.narrow_note
    assert [
        "minilm/full/b16/s48/rte/lr0.001/seed1: error",
        "minilm/full/b16/s48/rte/lr0.001: no score (undefined: the labels are constant)",
    ] == failures(run)


def test_a_seed_without_a_score_is_named_and_its_rate_is_not_chosen(frame):
    """The mean is that of the others; a rate at which every seed has a score is better, whatever it is."""
    some = [a_score(score=score, seed=seed) for seed, score in enumerate((0.5, None, 0.7))]
    (alone,) = results(frame(*some))
    (beside,) = results(frame(*some, *(a_score(score=0.1, seed=seed, rate=1e-2) for seed in range(3))))

    assert ("0.600 ± 0.141 (undefined: seed 1)", (1,)) == (alone.said_score(), alone.undefined)
    assert (1e-2, ()) == (beside.learning_rate, beside.undefined)


def test_a_rate_that_was_beaten_did_not_fail(tmp_path):
    """A campaign has dozens of them: they are counted, not listed."""
    run = a_run(tmp_path / "run", *scored_run(("rte",)))

    assert [] == failures(run)


# --- tables ---


def test_a_table_a_task(frame):
    """Methods in the order of the catalogue, memory with its source and as a share of full fine-tuning."""
    found = tables(results(frame(*scored_run(observed={"cuts": ["train: 640 of 2,490 rows"]}))))

    assert ["rte: minilm, batch 16 × 48 tokens, fp32", "mrpc: minilm, batch 16 × 48 tokens, fp32"] == [
        table.title for table in found
    ]
    assert list(METHODS) == [line[0] for line in found[0].lines]
    line = dict(zip(found[0].head, found[0].lines[4], strict=True))
    assert ("13.0 MiB (counted)", "14%", "0.004 of 0.002, 0.004") == (
        line["activation"],
        line["% of full"],
        line["rate"],
    )
    assert "Not the published sets: train: 640 of 2,490 rows." == found[0].notes[-1]
    assert "it flatters" in found[0].notes[0]


def test_tables_say_how_they_differ(frame):
    found = tables(results(frame(a_score(), a_score(device="cuda"), a_score(head="multiple_choice"))))

    assert ["counted", "cuda", "counted, head multiple_choice"] != [table.title for table in found]
    assert ["head default, counted", "head default, cuda", "head multiple_choice, counted"] == [
        table.title.partition("fp32, ")[2] for table in found
    ]


def test_a_method_with_fewer_seeds_says_which(frame):
    (table,) = tables(results(frame(a_score(), a_score(seed=1), a_score("lora", seed=1, score=0.6))))

    assert "0.600 (seed 1)" == table.lines[1][1]
    assert ("0.600*", "*: lora has seed 1 alone") == (
        table.narrow_lines[1][1],
        table.narrow_note.rpartition("; ")[2].rstrip("."),
    )


def test_what_always_the_same_answer_scores(frame):
    """Said where it is known: beside it a score of 0.66 may be none."""
    told = frame(a_score(metrics={"score_constant": counted(0.66)}), a_score(task="stsb"))

    notes = [" ".join(table.notes) for table in tables(results(told))]

    assert ["The best answer that is always the same scores 0.660, counted." in said for said in notes] == [True, False]


def test_scores_of_further_rows_have_a_column(frame):
    (table,) = tables(results(frame(a_score(metrics={"score_test": 0.65}), a_score("lora"))))

    assert ["method", "score", "test", "activation"] == list(table.head[:4])
    assert ["0.650", "-"] == [line[2] for line in table.lines]


def test_eighty_columns(printed):
    """A method a line, nothing folded, nothing cut."""
    text = printed(*scored_run())

    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if "±" in line and "MiB" not in line and "mean" not in line]
    assert 16 == len(rows)
    assert "full        0.712 ± 0.002       96.0 100% 62.0  1,007 0.004 of 2   22.7M" in rows
    assert "…" not in text
    assert "96 cells: 64 ok, 32 skipped (32 at a learning rate that another beat)" in text


def test_a_wide_terminal_has_all_that_the_page_has(printed):
    assert "74.0 MiB (counted)" in printed(*scored_run(("rte",)), width=140)


def test_a_run_of_steps_has_no_scores(printed):
    """And one of both has both tables."""
    assert "Score:" not in printed(a_measured_cell())


def test_both_kinds_in_one_run(printed):
    text = printed(a_measured_cell(), a_score())

    assert "Score:" in text
    assert "compared at equal batch" in text


# --- page, markdown, details ---


def test_the_page_has_the_scores(tmp_path):
    """A section with the tables and three figures; as Markdown, the tables."""
    run = a_run(tmp_path / "run", *scored_run(seeds=(0, 1), methods=("full", "lora", "meft1-exact")))

    write_report([run], tmp_path / "report", {"html", "md", "csv"})

    page = (tmp_path / "report" / "report.html").read_text()
    assert '<h2 id="scores">Scores</h2>' in page
    assert "<h3>mrpc: minilm, batch 16 × 48 tokens, fp32</h3>" in page
    assert 'id="table"' not in page
    names = {path.name for path in (tmp_path / "report" / "plots").iterdir()}
    assert {f"{name}.png" for name in ("score-by-memory", "score-by-time", "learning-curves")} <= names
    markdown = (tmp_path / "report" / "table.md").read_text()
    assert "| method | score | activation | % of full | time | tokens/s | rate | trained |" in markdown
    assert "| lora | 0." in markdown
    assert "learning_curve" in (tmp_path / "report" / "table.csv").read_text()


def test_what_is_in_a_name_stays_text(tmp_path):
    """A folder's name is not markup."""
    run = a_run(tmp_path / "run", a_score(task="./<b>x</b>"))

    write_report([run], tmp_path / "report", {"html"})

    assert "<b>x</b>" not in (tmp_path / "report" / "report.html").read_text()


def test_a_training_in_detail():
    """Scores first, then its curve: a row an evaluation, of hundreds some, the last among them."""
    curve = [[step, 0.5, None if step == 1 else 0.6] for step in range(1, 101)]
    found = {section.title: section.rows for section in sections(a_score(metrics={"learning_curve": curve_of(curve)}))}

    assert "score" == found["The training"][0][0]
    rows = found["Validation during the training"]
    assert ("step 1", "undefined (measured)", "score; loss 0.5") == rows[0]
    assert ("step 100", "0.6 (measured)", "score; loss 0.5") == rows[-1]
    assert len(rows) <= 14
    assert not any("learning_curve" == name for row in found.values() for name, *_ in row)


def curve_of(values):
    from meftbench.records.record import Metric

    return Metric(values, "measured")
