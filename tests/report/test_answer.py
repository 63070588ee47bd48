"""The answer of a run in sentences says what the records support, names sources, and does not depend on their order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_record, a_run, counted, measured, step_time
from meftbench.records.record import Metric
from meftbench.records.store import load_run
from meftbench.report.results import frame_of
from meftbench.report.views.answer import answers, headline
from scored_runs import a_score

MiB = 2**20
REPORTS = Path(__file__).resolve().parents[2] / "reports"


def a_cell_of(method, peak, seconds=None, source=counted, metrics=None, phase="backward", **fields):
    """A cell with a peak in MiB, of which 60 are parameters and the rest activations, and a step in seconds."""
    own = {
        "peak_allocated_bytes": source(peak * MiB),
        "parameters_bytes": counted(60 * MiB),
        "activations_bytes": counted((peak - 60) * MiB),
        "peak_phase": Metric(phase, "counted"),
    }
    own |= {} if seconds is None else {"step_time_s": step_time(seconds)}
    return a_record(method=method, metrics=own | (metrics or {}), **fields)


def the_answer(tmp_path, *records):
    (answer,) = answers(frame_of(a_run(tmp_path, *records)))
    return answer


def test_least_and_fastest_are_named_with_unit_source_and_ratio(tmp_path):
    answer = the_answer(
        tmp_path, a_cell_of("full", 400, 0.5), a_cell_of("lora+checkpoint", 100, 0.4), a_cell_of("meft1-exact", 80, 0.8)
    )

    assert answer.sentences[0] == (
        "meft1-exact holds least, a peak of 80.0 MiB (counted), 20 % below lora+checkpoint; "
        "lora+checkpoint is fastest, 400 ms a step (measured)"
    )
    assert answer.title == "batch 8 × 128 tokens: bert-base@random, counted, fp32"
    assert answer.facts["least"][0]["peak_bytes"] == 80 * MiB


def test_speed_is_a_ratio_to_lora_with_checkpointing_or_to_full(tmp_path):
    plain = the_answer(tmp_path / "1", a_cell_of("full", 400, 0.6), a_cell_of("parallel", 100, 0.3))
    both = the_answer(
        tmp_path / "2",
        *(a_cell_of("full", 400, 0.6), a_cell_of("parallel", 100, 0.3), a_cell_of("lora+checkpoint", 90, 0.45)),
    )

    assert "parallel is fastest, 2.0 × full (measured)" in plain.sentences[0]
    assert "parallel is fastest, 1.5 × lora+checkpoint (measured)" in both.sentences[0]


def test_the_least_is_held_against_the_best_levers_of_lora(tmp_path):
    """Not against a lora that has fewer levers than it could have; the time has the same reference."""
    lora = {"lora": 300, "lora+checkpoint": 200, "lora+checkpoint+chunked_loss": 100}
    cells = [a_cell_of(method, peak, 0.9) for method, peak in lora.items()]
    answer = the_answer(tmp_path, a_cell_of("full", 400, 0.6), a_cell_of("leapfrog+cut_loss", 80, 0.3), *cells)

    assert answer.sentences[0] == (
        "leapfrog+cut_loss holds least, a peak of 80.0 MiB (counted), 20 % below lora+checkpoint+chunked_loss; "
        "leapfrog+cut_loss is fastest, 3.0 × lora+checkpoint+chunked_loss (measured)"
    )


@pytest.mark.parametrize(
    ("peaks", "text"),
    [
        ({"lora": 150, "lora+checkpoint": 75, "parallel": 100, "meft1": 150}, "25 % below parallel"),
        (
            {"parallel": 90, "parallel+checkpoint": 75, "full": 400, "full+checkpoint": 100},
            "25 % below full+checkpoint",
        ),
        ({"lora": 99.9, "parallel": 99.8}, "less than 1 % below lora"),
    ],
)
def test_without_another_lora_the_least_is_held_against_the_next_method(tmp_path, peaks, text):
    answer = the_answer(tmp_path, *(a_cell_of(method, peak) for method, peak in peaks.items()))

    assert answer.sentences[0].endswith(f", {text}")


def test_a_method_is_not_held_against_itself(tmp_path):
    answer = the_answer(tmp_path, a_cell_of("lora", 150, 0.1), a_cell_of("lora+checkpoint", 75, 0.2))

    assert answer.sentences[0] == (
        "lora+checkpoint holds least, a peak of 75.0 MiB (counted); lora is fastest, 100 ms a step (measured)"
    )


def test_a_wrong_gradient_is_never_named_best(tmp_path):
    wrong = {"gradient_rel_max": measured(3.0)}
    answer = the_answer(
        tmp_path, a_cell_of("full", 400, 0.5), a_cell_of("meft3", 70, 0.1, metrics=wrong), a_cell_of("lora", 300, 0.3)
    )

    assert answer.facts["least"][0]["methods"] == answer.facts["fastest"][0]["methods"] == ["lora"]
    assert "(meft3 holds 70.0 MiB, but gradient is wrong by 300 %)" in answer.sentences[0]


def test_a_method_without_a_backward_pass_is_named_beside_the_best(tmp_path):
    answer = the_answer(tmp_path, a_cell_of("lora", 300), a_cell_of("mezo", 70, phase="forward"))

    assert answer.facts["least"][0]["methods"] == ["lora"]
    assert "but it has no backward pass" in answer.sentences[0]


def test_ties_are_named_as_ties(tmp_path):
    answer = the_answer(tmp_path, a_cell_of("lora", 90, 0.2), a_cell_of("full", 200, 0.2), a_cell_of("houlsby", 90, 1))

    assert answer.sentences[0].startswith("houlsby and lora hold least, a peak of 90.0 MiB (counted)")
    assert "full and lora are fastest, 200 ms a step (measured)" in answer.sentences[0]


def test_times_within_the_spread_of_the_fastest_are_said(tmp_path):
    answer = the_answer(
        tmp_path, a_cell_of("lora", 90, 0.200), a_cell_of("parallel", 99, 0.202), a_cell_of("full", 400, 1)
    )

    assert answer.facts["fastest"][0]["within_spread"] == ["parallel"]
    assert "parallel within the spread of its times" in answer.sentences[0]


def test_times_on_a_busy_machine_are_said_to_be_so(tmp_path):
    busy = {"cpu_wait_share": measured(0.5)}
    answer = the_answer(tmp_path, a_cell_of("lora", 90, 0.2, metrics=busy), a_cell_of("full", 400, 1))

    assert "while other processes held the cores" in answer.sentences[0]


def test_what_the_largest_peak_consists_of(tmp_path):
    sizes = {"activations_bytes": counted(244 * MiB), "optimizer_bytes": counted(96 * MiB), "inputs_bytes": counted(1)}
    answer = the_answer(tmp_path, a_cell_of("full", 400, metrics=sizes), a_cell_of("lora", 90))

    assert answer.sentences[1] == (
        "of full's 400.0 MiB (counted), tensors made in forward are 61 %, optimizer state 24 %, parameters 15 %; the "
        "peak is in backward"
    )


def test_a_lever_saves_what_the_same_method_holds_less_with_it(tmp_path):
    answer = the_answer(
        tmp_path,
        a_cell_of("lora", 300, phase="forward"),
        a_cell_of("lora+checkpoint", 100),
        a_cell_of("full", 900, phase="optimizer"),
        a_cell_of("full+checkpoint", 900, phase="optimizer"),
        a_cell_of("parallel+checkpoint", 50),  # without the lever it was not run
    )

    assert answer.sentences[2:4] == (
        "+checkpoint saves 200.0 MiB of lora's peak of 300.0 MiB (counted): at the peak, tensors made in forward went "
        "from 240.0 MiB to 40.0 MiB; the peak was in forward and is now in backward",
        "+checkpoint saves nothing on full (counted): the peak is in the optimizer's step, in which no tensors of "
        "forward are held",
    )
    assert [(pair["with"], pair["saves_bytes"] / MiB) for pair in answer.facts["levers"]] == [
        ("lora+checkpoint", 200),
        ("full+checkpoint", 0),
    ]


def test_the_tensors_at_the_peak_say_why_a_lever_saves_no_more(tmp_path):
    def buffers(op, place, *modules):
        row = {"bytes": 50 * MiB, "count": 1, "category": "activations", "op": op, "shape": [8, 9], "dtype": "float32"}
        rows = [row | {"place": place, "module": module} for module in modules] or [row | {"place": place}]
        return {"peak_buffers": Metric(rows, "counted")}

    answer = the_answer(
        tmp_path,
        a_cell_of("lora+checkpoint", 300, metrics=buffers("_log_softmax.default", "loss:forward")),
        a_cell_of("lora+checkpoint+chunked_loss", 100, metrics=buffers("bmm.default", "attention:f", "b", "a", "b")),
    )

    assert (
        "the largest tensors at the peak were of the loss over the vocabulary (50.0 MiB), and are now of attention "
        "(150.0 MiB, the largest part in b)"
    ) in answer.sentences[2]


def test_cells_that_ran_out_are_said_and_which_lever_lets_them_end(tmp_path):
    on = {"device": "predicted:a100-80gb"}
    answer = the_answer(
        tmp_path,
        a_record("oom", method="lora", **on),
        a_cell_of("lora+checkpoint", 100, **on),
        a_cell_of("full", 200, **on),
    )

    assert "lora does not fit a100-80gb (predicted)" in answer.sentences
    assert "lora ends ok with +checkpoint" in answer.sentences
    assert answer.facts["ended"] == {"ok": ["full", "lora+checkpoint"], "oom": ["lora"]}


def test_sources_are_not_mixed(tmp_path):
    answer = the_answer(
        tmp_path, a_cell_of("lora", 90), a_cell_of("full", 50, source=measured), a_cell_of("houlsby", 95)
    )

    assert [(fact["source"], fact["methods"]) for fact in answer.facts["least"]] == [
        ("counted", ["lora"]),
        ("measured", ["full"]),
    ]


def test_shapes_are_answered_one_by_one_and_the_largest_is_the_headline(tmp_path):
    records = [a_cell_of("lora", 90, batch_size=4), a_cell_of("lora", 200), a_cell_of("full", 400, batch_size=4),
               a_cell_of("full", 500)]  # fmt: skip
    frame = frame_of(a_run(tmp_path, *records))

    assert [answer.facts["batch_size"] for answer in answers(frame)] == [4, 8]
    assert headline(frame)[0].startswith("at batch 8 × 128 tokens, lora holds least, a peak of 200.0 MiB (counted)")
    assert 1 <= len(headline(frame)) <= 3


def test_ranks_are_answered_beside_one_process_and_all_cells_are_counted(tmp_path):
    """What is least in one process is not said as if it were least of all, nor its cells as if they were all."""
    ranks = {"world_size": 2, "parallelism": "fsdp2"}
    records = [a_cell_of("lora", 90), a_cell_of("full", 200), a_cell_of("lora", 50, **ranks)]
    said = headline(frame_of(a_run(tmp_path, *records)))

    assert said[0].startswith("at batch 8 × 128 tokens in one process, lora holds least, a peak of 90.0 MiB (counted)")
    assert "in 2 ranks under fsdp2 lora holds least, 50.0 MiB (counted) in a rank" == said[1]
    assert "of full's 200.0 MiB (counted)" in said[2]


@pytest.mark.parametrize(("ended", "said"), [("ok", "all 3 cells ended ok"), ("error", "2 of 3 cells ended ok")])
def test_the_headline_counts_the_cells_of_all_shapes(tmp_path, ended, said):
    peak = {"peak_allocated_bytes": 1000}
    records = [a_record(ended, peak, method="full", batch_size=1), a_record(metrics=peak, method="full", batch_size=2)]
    records.append(a_record(metrics=peak, method="lora", batch_size=2))

    assert said == headline(frame_of(a_run(tmp_path, *records)))[-1]


@pytest.mark.parametrize("status", ["oom", "error", "timeout", "skipped"])
def test_without_a_cell_that_ended_ok_only_its_end_is_said(tmp_path, status):
    answer = the_answer(tmp_path, a_record(status))

    assert len(answer.sentences) == 1
    assert answer.sentences[0].startswith("full ")
    assert answer.facts["least"] == answer.facts["fastest"] == []


def test_one_cell_is_not_compared_with_itself(tmp_path):
    answer = the_answer(tmp_path, a_cell_of("full", 400, 0.5))

    assert answer.sentences[0] == "full holds a peak of 400.0 MiB (counted); a step of full takes 500 ms (measured)"


def test_no_cell_has_no_answer(tmp_path):
    frame = frame_of(a_run(tmp_path))

    assert answers(frame) == headline(frame) == []


def test_numbers_that_are_none_are_left_out(tmp_path):
    odd = {"peak_allocated_bytes": counted(math.nan), "step_time_s": measured(math.inf)}
    answer = the_answer(tmp_path, a_cell_of("full", 400, metrics=odd), a_cell_of("lora", 90, 0.1))

    assert answer.facts["least"][0]["methods"] == ["lora"]
    assert "nan" not in " ".join(answer.sentences)


# --- trainings ---


def test_the_best_score_within_the_spread_of_seeds_and_its_memory(tmp_path):
    records = [
        a_score(method, score + delta, seed=seed)
        for method, score in {"full": 0.80, "meft1-exact": 0.79, "lora": 0.60}.items()
        for seed, delta in enumerate((-0.02, 0.02))
    ]
    answer = the_answer(tmp_path, *records)

    assert answer.facts["best"] == "full"
    assert answer.facts["within_noise"] == ["meft1-exact"]
    assert answer.sentences == (
        "full scores best, 0.800 ± 0.028 (accuracy on validation, measured over 2 seeds), and within the spread of "
        "seeds meft1-exact does",
        "of these, meft1-exact holds 14.4 MiB of activation memory (counted), 15 % of full's",
    )


def test_with_one_seed_the_spread_is_said_not_to_be_known(tmp_path):
    answer = the_answer(tmp_path, a_score("full", 0.8), a_score("lora", 0.79))

    assert answer.facts["within_noise"] == []
    assert answer.sentences[0].endswith("how far seeds differ is not known")


def test_several_tasks_are_counted(tmp_path):
    records = [a_score(method, score, task=task) for task in ("rte", "sst2")
               for method, score in (("full", 0.8), ("lora", 0.8))]  # fmt: skip

    assert headline(frame_of(a_run(tmp_path, *records))) == [
        "full is best or within the spread of seeds on 2 of 2 tasks (minilm) and lora on 2",
        "activation memory as a share of full's (counted, the median over these tasks): full 100 %, lora 77 %",
    ]


def a_task(task, scores, constant=None):
    """Trainings with three seeds; scores: by method, of each seed.  constant: `score_constant`, as recorded."""
    recorded = {} if constant is None else {"score_constant": counted(constant)}
    return [
        a_score(method, score, task=task, seed=seed, metrics=recorded)
        for method, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]


def test_tasks_of_which_nothing_was_learnt_are_not_counted(tmp_path):
    """Neither where the records have the constant answer's score, nor where several methods have one score alone."""
    same = [0.66, 0.66, 0.66]
    records = [
        *a_task("sst2", {"full": [0.8, 0.81, 0.79], "lora": [0.7, 0.71, 0.69], "meft1": [0.53, 0.53, 0.53]}, 0.53),
        *a_task("cola", {"full": [0.0, 0.0, 0.0], "lora": [0.0, -0.1, 0.0], "meft1": [0.0, 0.0, 0.0]}, 0.0),
        *a_task("mrpc", {"full": [0.67, 0.67, 0.7], "lora": same, "meft1": same}),
        *a_task("rte", {"full": [0.57, 0.59, 0.58], "lora": same, "meft1": [0.5, 0.6, 0.7]}),
    ]
    frame = frame_of(a_run(tmp_path, *records))
    by_task = {answer.facts["task"]: answer for answer in answers(frame)}

    assert {task: answer.facts["learnt"] for task, answer in by_task.items()} == {
        "cola": False, "mrpc": False, "rte": True, "sst2": True
    }  # fmt: skip
    assert headline(frame) == [
        "full is best or within the spread of seeds on 1 of 2 tasks (minilm), lora on 1 and meft1 on 1",
        "activation memory as a share of full's (counted, the median over these tasks): full 100 %, lora 77 %, "
        "meft1 14 %",
        "not among these tasks: cola, mrpc, on which most methods score as an answer that is always the same: nothing "
        "was learnt there",
    ]
    assert by_task["cola"].sentences == (
        "no method has learnt the task: all 3 are with each seed no better than an answer that is always the same, "
        "the best 0.000 ± 0.000 (accuracy on validation, measured)",
    )
    assert by_task["sst2"].sentences[-1] == (
        "meft1 learnt nothing: with each seed no better than an answer that is always the same"
    )


def test_where_nothing_was_learnt_at_all_no_method_is_named(tmp_path):
    records = [record for task in ("rte", "sst2") for record in a_task(task, {"full": [0.5, 0.5], "lora": [0.5, 0.5]})]

    assert headline(frame_of(a_run(tmp_path, *records))) == [
        "on none of 2 tasks has a method a score that can be compared",
        "left out: rte, sst2, on which most methods score as an answer that is always the same: nothing was learnt "
        "there",
    ]


def test_a_training_without_a_score_is_said(tmp_path):
    assert the_answer(tmp_path, a_score("full", None)).sentences == ("no method has a score",)


# --- committed runs ---


@pytest.mark.parametrize("name", ["minilm-cpu", "smollm2-cpu", "best-levers", "quality-minilm"])
def test_the_order_of_records_does_not_matter(name):
    frame = frame_of(load_run(REPORTS / name))
    found = answers(frame)

    assert answers(frame.iloc[::-1].reset_index(drop=True)) == found
    assert answers(frame.sample(frac=1, random_state=1).reset_index(drop=True)) == found
    assert json.loads(json.dumps([answer.facts for answer in found], allow_nan=False))
    assert 1 <= len(headline(frame)) <= 3


def test_best_levers_of_a_language_model():
    frame = frame_of(load_run(REPORTS / "best-levers"))
    longest = answers(frame)[-1]

    assert longest.facts["tokens"] == 65536
    assert "lora+checkpoint" in longest.facts["ended"]["oom"]
    assert {"method": "lora+checkpoint", "lever": "chunked_loss"} in longest.facts["fits_with"]
    assert all(saving["source"] == "predicted" for saving in longest.facts["levers"])
    assert [answer.facts["least"][0]["reference"] for answer in answers(frame)] == [
        "lora+checkpoint+tiled_mlp+cut_loss",
        "lora+checkpoint+tiled_mlp+chunked_loss",
        "lora+checkpoint+tiled_mlp+chunked_loss",
    ]


def test_committed_trainings_of_which_nothing_was_learnt():
    found = answers(frame_of(load_run(REPORTS / "quality-minilm")))

    assert [answer.facts["task"] for answer in found if not answer.facts["learnt"]] == ["cola", "mrpc"]


METHODS = ["full", "full+checkpoint", "lora", "lora+checkpoint", "parallel", "meft1-exact", "mezo"]
cells = st.lists(
    st.tuples(
        st.sampled_from(METHODS),
        st.one_of(st.none(), st.integers(60, 900), st.just(math.nan)),
        st.one_of(st.none(), st.floats(0.01, 9)),
        st.sampled_from(["ok", "ok", "oom", "error"]),
        st.one_of(st.none(), st.sampled_from([0.0, 5.0, math.nan])),
    ),
    max_size=7,
    unique_by=lambda cell: cell[0],
)


@given(cells=cells)
def test_whatever_cells_there_are(tmp_path_factory, cells):
    """The least has a right gradient and the lowest peak of those, the facts are JSON, and order changes nothing."""
    records = []
    for method, peak, seconds, status, error in cells:
        taken = {} if peak is None else {"peak_allocated_bytes": counted(peak if peak != peak else peak * MiB)}
        taken |= {} if seconds is None else {"step_time_s": step_time(seconds)}
        taken |= {} if error is None else {"gradient_rel_max": measured(error)}
        records.append(a_record(status, method=method, metrics=taken))
    folder = tmp_path_factory.mktemp("runs")
    found = answers(frame_of(a_run(folder / "1", *records)))

    assert found == answers(frame_of(a_run(folder / "2", *reversed(records))))
    assert all(answer.sentences for answer in found)
    json.dumps([answer.facts for answer in found], allow_nan=False)
    right = [peak * MiB for method, peak, _, status, error in cells
             if peak is not None and peak == peak and status == "ok" and method != "mezo"
             and error in (None, 0.0)]  # fmt: skip
    least = [fact["peak_bytes"] for answer in found for fact in answer.facts["least"]]
    assert least == ([min(right)] if right else [])
