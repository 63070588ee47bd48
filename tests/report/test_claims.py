"""The paper's claims beside our numbers: how they are computed, what is missing, and which reason is given when."""

from __future__ import annotations

from string import Formatter

import pytest

from builders import MiB, a_record, a_run, measured
from meftbench.catalogue.metrics import METRICS
from meftbench.plan.claims import among, paper_claims
from meftbench.plan.training import Training
from meftbench.records.record import Metric
from meftbench.report.render.report import write_report
from meftbench.report.results import frame_of
from meftbench.report.views.claims import claim_tables

ACTIVATION, PEFT = "Activation memory up to 84 % below full fine-tuning", "Earlier parameter-efficient methods"
# Beside the fields of a cell, what a comparison knows.
FACTS = {"source", "number", "differs", "metric", "test", "cut", "cuts", "seeds", "within", "exact", "best", "other"}


def memory(method, mib, attention="eager", metric="paper_meft_activation_bytes", status="ok", source="counted", **more):
    """A cell of the paper's memory setting that holds `mib` by the paper's metric, and by ours."""
    params = {"method_params": {"adapter_size": 8}} if method.startswith(("meft", "houlsby")) else {}
    taken = {metric: Metric(mib * MiB, source), "activation_peak_bytes": Metric(mib * MiB, source)} if mib else {}
    setting = {"batch_size": 16, "sequence_length": 512, "attention_requested": attention}
    return a_record(status, metrics=taken, method=method, **(setting | params | more))


def trained(method, score, task="rte", rate=5e-4, **more):
    """A training on a task, scored on validation; `test`: on test rows, too; `cuts`: of its data."""
    test, cuts = more.pop("test", None), more.pop("cuts", [])
    taken = {"score": measured(score), "training_time_s": measured(60.0), "training_tokens_per_s": measured(900.0)}
    taken |= {"activation_peak_bytes": 1000 * MiB} | ({"score_test": measured(test)} if test is not None else {})
    training = Training(task=task, learning_rate=rate)
    observed = {"scored_by": "accuracy", "cuts": cuts}
    return a_record(method=method, metrics=taken, training=training, observed=observed, **more)


def table_of(tmp_path, *records, about=ACTIVATION):
    found = claim_tables(frame_of(a_run(tmp_path / "run", *records)))
    return next(table for table in found if table.title.startswith(about))


def rows_of(tmp_path, *records, about=ACTIVATION):
    return table_of(tmp_path, *records, about=about).rows


def test_a_saving_is_that_of_the_best_method_in_the_papers_unit_and_in_bytes(tmp_path):
    """A GB of the paper's code is a thousand MiB."""
    records = [memory("full", 5000), memory("meft1", 1000), memory("meft3", 800), memory("lora", 9)]

    table = table_of(tmp_path, *records)

    (row,) = table.rows
    assert ["84.0% (by meft3(adapter_size=8), counted)", "the same by activation_peak_bytes"] == row.ours
    assert table.known.startswith("The paper: up to 84.0%. Source: the abstract. Unknown: backbone and shape")
    assert [
        "full: 5.000 GB, 5,242,880,000 B",
        "meft1(adapter_size=8): 1.000 GB, 1,048,576,000 B, 20.0% of full",
        "meft3(adapter_size=8): 0.800 GB, 838,860,800 B, 16.0% of full",
    ] == row.amounts


def test_what_the_paper_leaves_out_stands_beside_it(tmp_path):
    records = [memory("full", 1000), memory("meft1", 100), memory("lora+checkpoint", 150), memory("meft1-exact", 90)]

    (row,) = rows_of(tmp_path, *records)

    assert ["lora+checkpoint 85.0%", "meft1-exact(adapter_size=8) 91.0%"] == row.ours[2:]


def test_a_share_is_the_smallest_of_the_methods(tmp_path):
    (row,) = rows_of(tmp_path, memory("full", 1000), memory("lora", 830), memory("houlsby", 750), about=PEFT)

    assert "75.0% (by houlsby(adapter_size=8), counted)" == row.ours[0]


@pytest.mark.parametrize(
    ("full", "said"),
    [
        ([], "unknown: full is not in the run at this shape and setting, nothing to hold the others against"),
        ([memory("full", None, status="oom")], "unknown: full ended oom, nothing to hold the others against"),
        ([memory("full", 900, attention="sdpa")], "unknown: full is not in the run at this shape and setting"),
    ],
)
def test_a_missing_cell_is_named(tmp_path, full, said):
    """A cell at another setting is no replacement."""
    rows = rows_of(tmp_path, *full, memory("meft1", 100))

    (row,) = [row for row in rows if "attention eager" in row.cells]
    assert row.ours[0].startswith(said)
    assert [] == row.why == row.amounts


def test_a_method_that_failed_is_named_beside_those_that_did_not(tmp_path):
    (row,) = rows_of(tmp_path, memory("full", 1000), memory("meft1", 100), memory("meft3", None, status="error"))

    assert "90.0% (by meft1(adapter_size=8), counted)" == row.ours[0]
    assert "without meft3(adapter_size=8) ended error" == row.ours[-1]


def test_another_metric_that_says_otherwise_is_said(tmp_path):
    """Where the optimizer step sets the peak, the paper's metric is not the activations."""
    low = memory("meft1", 100)
    low.metrics["activation_peak_bytes"] = Metric(50 * MiB, "counted")

    (row,) = rows_of(tmp_path, memory("full", 1000), low)

    assert "95.0% by activation_peak_bytes" == row.ours[1]


def test_where_the_papers_metric_is_not_recorded_it_is_derived_and_said_so(tmp_path):
    """A prediction has no allocator to ask: the peak above the level between steps."""
    records = [memory("full", 1000), memory("meft1", 100)]
    for record in records:
        held = record.metrics.pop("paper_meft_activation_bytes").value
        record.metrics["peak_allocated_bytes"] = Metric(held + 7 * MiB, "counted")
        record.metrics["baseline_allocated_bytes"] = Metric(7 * MiB, "counted")

    (row,) = rows_of(tmp_path, *records)

    assert row.ours[0].startswith("90.0%")
    assert any("derived" in sentence for sentence in row.why)


def test_a_fused_kernel_is_explained_by_the_number_with_eager_attention(tmp_path):
    """Of the same run, shape and setting; without such cells nothing is said of it."""
    fused = [memory("full", 500, attention="sdpa"), memory("meft1", 60, attention="sdpa")]
    eager = [memory("full", 1000), memory("meft1", 100)]
    elsewhere = [memory("full", 1000, batch_size=32), memory("meft1", 200, batch_size=32)]

    (alone,) = rows_of(tmp_path / "1", *fused)
    (_, beside) = rows_of(tmp_path / "2", *eager, *fused)
    unlike = rows_of(tmp_path / "3", *fused, *elsewhere)[0]

    assert any("with eager attention it is 90.0%" in sentence for sentence in beside.why)
    assert not any("with eager attention" in sentence for sentence in (*alone.why, *unlike.why))


def test_a_reason_that_all_rows_have_is_said_once(tmp_path):
    """Above them; those of one stay there."""
    eager = [memory("full", 1000), memory("meft1", 100)]
    fused = [memory("full", 500, attention="sdpa"), memory("meft1", 60, attention="sdpa")]

    table = table_of(tmp_path, *eager, *fused)

    assert any("Counted on a CPU" in sentence for sentence in table.always)
    assert table.notes[1].startswith("In all of them: ")
    assert ["Eager attention"] == [sentence.split(":")[0] for sentence in table.rows[0].why]
    assert all("Counted" not in sentence for row in table.rows for sentence in row.why)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "Eager attention"),
        ({}, "Counted on a CPU"),
        ({}, "Random weights"),
        ({}, "retain_graph"),
        ({"device": "predicted:a6000", "source": "predicted"}, "(predicted:a6000)"),
        ({"model_config_overrides": {"attention_probs_dropout_prob": 0.0}}, "no dropout"),
    ],
)
def test_a_reason_needs_its_fact(tmp_path, more, said):
    """Each is given with it, and none of them where measured weights ran fused attention with dropout."""
    (row,) = rows_of(tmp_path / "1", memory("full", 1000, **more), memory("meft1", 100, **more))
    plain = {"model": "bert-base", "source": "measured", "device": "cuda", "attention": "sdpa"}
    (other,) = rows_of(tmp_path / "2", memory("full", 1000, **plain), memory("meft1", 300, **plain))

    assert any(said in sentence for sentence in row.why)
    assert not any(said in sentence for sentence in other.why)


def test_a_run_without_such_cells_has_no_section(tmp_path):
    """Another length, and nothing that a claim speaks of."""
    other = [memory("full", 1000, sequence_length=128), memory("meft1", 100, sequence_length=128)]
    run = a_run(tmp_path / "run", *other)

    write_report([run], tmp_path / "out", {"html", "md"})

    assert [] == claim_tables(frame_of(run))
    for name in ("report.html", "table.md"):
        assert "claims" not in (tmp_path / "out" / name).read_text().lower()


def test_page_and_table_have_the_section(tmp_path):
    run = a_run(tmp_path / "run", memory("full", 5000), memory("meft3", 800))

    write_report([run], tmp_path / "out", {"html", "md"})

    for name in ("report.html", "table.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "The paper's claims" in text.replace("&#39;", "'")
        assert "1,048,576,000 bytes" in text
        assert "84.0% (by meft3" in text


def test_a_score_gap_is_of_the_best_training_of_each(tmp_path):
    """Chosen on validation over rates; in points."""
    records = [trained("full", 0.70), trained("meft1", 0.60), trained("meft3", 0.68, rate=1e-3), trained("lora", 0.69)]

    (row,) = rows_of(tmp_path, *records, about="The same GLUE score")

    assert ["-2.0 points (measured)", "lora 0.690"] == row.ours
    assert "meft3 0.680 with 1.000 GB, 1,048,576,000 B of activations" == row.amounts[1]
    assert "meft3, rate 0.001" in row.cells
    assert any("validation rows" in sentence for sentence in row.why)


def test_test_rows_and_cut_data_are_said(tmp_path):
    """A score of test rows is taken where there is one; the checkpoint was chosen on validation."""
    records = [trained("meft1", 0.5, task="openbookqa", test=0.33, cuts=["train: 100 of 4,957 rows"])]

    (row,) = rows_of(tmp_path, *records, about="37 on OpenBookQA")

    assert ["33.0% (measured)"] == row.ours[:1]
    assert any("train: 100 of 4,957 rows" in sentence for sentence in row.why)
    assert not any("validation rows" in sentence for sentence in row.why)


@pytest.mark.parametrize(
    ("exact", "seeds", "said", "unsaid"),
    [
        (0.69, [0.68], "score higher", "standard deviation"),
        (0.60, [0.68], "rates of full", "score higher"),
        (0.60, [0.66, 0.70], "standard deviation", "score higher"),
        (0.60, [0.679, 0.681], "rates of full", "standard deviation"),
    ],
)
def test_reasons_for_a_lower_score_need_numbers(tmp_path, exact, seeds, said, unsaid):
    """The paper's arithmetic is blamed where exact methods do better, seeds where the gap is within their spread."""
    params = {"adapter_size": 8}
    meft = [trained("meft1", score, seed=seed, method_params=params) for seed, score in enumerate(seeds)]
    records = [trained("full", 0.70), trained("meft1-exact", exact), *meft]

    (row,) = rows_of(tmp_path, *records, about="The same GLUE score")

    assert row.ours[0].startswith("-2.0 points")
    assert any(said in sentence for sentence in row.why)
    assert not any(unsaid in sentence for sentence in row.why)


def test_a_gap_without_full_says_so(tmp_path):
    (row,) = rows_of(tmp_path, trained("meft1", 0.6), about="The same GLUE score")

    assert ["unknown: full is not in the run on rte, nothing to hold the others against"] == row.ours


@pytest.mark.parametrize(
    ("globs", "value", "expected"),
    [
        (["bert*"], "bert-base", True),
        (["!bert*"], "bert-base", False),
        (["!bert*", "!opt-*"], "vit", True),
        (["16", "32"], 32, True),
        (["meft[123](adapter_size=8)"], "meft2(adapter_size=8)", True),
        (["meft[123](adapter_size=8)"], "meft2-exact(adapter_size=8)", False),
    ],
)
def test_globs(globs, value, expected):
    assert expected == among(globs, value)


def test_every_claim_speaks_of_facts_that_there_are(tmp_path):
    """A misspelt fact would never match, and one that cannot be filled in would fail where it is said."""
    columns = set(frame_of(a_run(tmp_path / "run", memory("full", 1000))).columns) | FACTS

    for claim in paper_claims():
        wanted = [claim.of, *(reason.when for reason in claim.reasons)]
        filled = {name for reason in claim.reasons for _, name, _, _ in Formatter().parse(reason.says) if name}
        assert {name for globs in wanted for name in globs} | filled <= columns
        assert claim.metric in METRICS
        assert len(claim.reasons) >= 3


def test_claims_are_those_of_the_paper():
    """By their numbers: docs/paper.md, "Claims"."""
    stated = {claim.name: claim.stated for claim in paper_claims()}
    quoted = {
        "activation-84": 0.84,
        "peft-70": 0.70,
        "sst2-968": 0.968,
        "openbookqa-37": 0.37,
        "arc-challenge-341": 0.341,
    }

    assert quoted == {name: number for name, number in stated.items() if number}
    assert {"glue", "qa", "images"} == {name for name, number in stated.items() if number == 0}
