"""How long a run takes is told from what cells took on this machine, as a range that says what it is from."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_cell, a_record, a_run, counted, measured
from meftbench.plan.protocol import Protocol
from meftbench.runner import host
from meftbench.runner.duration import (
    Duration,
    Expected,
    Remaining,
    duration,
    expected,
    history,
    parameters_of,
    pasts,
    rounded,
    span,
    total,
)

PROTOCOL = Protocol()
HERE = socket.gethostname()


def past(*records):
    return pasts(records, PROTOCOL.model_dump(mode="json"), HERE)


def took(wall_s, passes_s=None, parameters=100, status="ok", **fields):
    metrics = {"parameters_total": counted(parameters)}
    metrics |= {} if passes_s is None else {"passes_s": measured(passes_s)}
    return a_record(status, metrics=metrics, wall_s=wall_s, **({"host": HERE} | fields))


def test_the_same_cell_takes_what_it_took():
    found = expected(a_cell(seed=3), PROTOCOL, past(took(10.0), took(14.0, seed=1), took(99.0, method="lora")))

    assert found == Expected(12.0, is_same=True)


def test_another_shape_is_scaled_by_its_tokens_without_what_does_not_grow():
    """Of 10 s, 2 s are for starting and building; the rest grows with twice the tokens."""
    found = expected(a_cell(batch_size=16), PROTOCOL, past(took(10.0, passes_s=8.0)))

    assert found == Expected(18.0, is_same=False)


def test_more_steps_take_longer():
    found = expected(a_cell(), PROTOCOL.model_copy(update={"warmup": 2, "steps": 12}), past(took(10.0, passes_s=8.0)))

    assert found is not None
    assert found.seconds == pytest.approx(2 + 8 * 14 / 7)


def test_another_model_is_scaled_by_its_parameters():
    cell = a_cell(model="bert-large@random")
    parameters = parameters_of(cell)
    found = expected(cell, PROTOCOL, past(took(10.0, passes_s=8.0, parameters=parameters / 3)))

    assert found is not None
    assert found.seconds == pytest.approx(2 + 8 * 3)


def test_parameters_are_about_those_of_the_model():
    assert parameters_of(a_cell(model="llama-3.2-1b@random")) == pytest.approx(1.2e9, rel=0.25)
    assert parameters_of(a_cell(model="some/hub-model")) is None


@pytest.mark.parametrize(
    "other", [{"host": "elsewhere"}, {"status": "error"}, {"device": "cuda"}, {"precision": "bf16"}]
)
def test_what_tells_nothing_is_left_out(other):
    status = other.pop("status", "ok")

    assert expected(a_cell(), PROTOCOL, past(took(10.0, status=status, **other))) is None


def test_a_run_says_its_time_and_from_what():
    cells = [a_cell(), a_cell(), a_cell(batch_size=16)]
    found = duration(cells, PROTOCOL, past(took(100.0)))

    assert found.seconds == 400
    assert found.sentence() == (
        "3 cells, 4 to 11 min (from 2 like cells measured on this machine, 1 scaled from others)"
    )
    assert duration(cells[:2], PROTOCOL, past(took(100.0))).sentence() == (
        "2 cells, about 3 min (from 2 like cells measured on this machine)"
    )


def test_what_is_not_known_is_said():
    nothing = duration([a_cell()], PROTOCOL, [])
    some = total([Expected(60.0, is_same=True), None])

    assert nothing.sentence().startswith("1 cell; no like cell has run on this machine: the time is not known yet")
    assert nothing.to_json()["expected_s"] is some.to_json()["expected_s"] is None
    assert some.sentence() == (
        "2 cells, 1 of them about 1 min (from 1 like cell measured on this machine; of 1 more nothing is known yet)"
    )


def test_cells_beside_each_other_take_less():
    assert total([Expected(60.0, is_same=True)] * 4, at_a_time=2).seconds == 120


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (9.4, "9 s"), (47, "45 s"), (59, "1 min"), (245, "4 min"), (3600, "1.0 h"), (9000, "2.5 h")],
)
def test_durations_are_rounded(seconds, text):
    assert rounded(seconds) == text


def test_a_span_has_its_unit_once():
    assert span(120, 480) == "2 to 8 min"
    assert span(30, 120) == "30 s to 2 min"
    assert span(100, 130) == "about 2 min"


@given(st.lists(st.one_of(st.none(), st.floats(0.1, 1e4)), max_size=6), st.integers(1, 4))
def test_the_range_holds_what_is_expected(seconds, at_a_time):
    found = total([None if s is None else Expected(s, is_same=False) for s in seconds], at_a_time)

    assert (found.seconds is None) == (not any(s is not None for s in seconds))
    assert found.seconds is None or found.low <= found.seconds <= found.high
    assert found.cells == len(seconds)
    assert isinstance(found, Duration)
    assert found.sentence()


def test_what_is_left_follows_what_cells_took():
    """Cells take twice what was expected; the one of which nothing was known takes what the others took."""
    records = [took(20.0, repeat=repeat) for repeat in range(4)]
    keys = [(record.cell_id, record.repeat) for record in records]
    remaining = Remaining(dict(zip(keys, [Expected(10.0, is_same=True)] * 3 + [None], strict=True)))

    assert remaining.seconds() is None
    remaining.ended(records[0])
    assert remaining.seconds() == pytest.approx(20 + 20 + 20)
    assert remaining.text() == "about 1 min left"
    for record in records[1:]:
        remaining.ended(record)
    assert remaining.text() == ""


def test_a_skipped_cell_says_nothing_about_the_others():
    records = [took(0.0, status="skipped"), took(5.0, repeat=1)]
    remaining = Remaining({(record.cell_id, record.repeat): None for record in records})
    remaining.ended(records[0])

    assert remaining.text() == ""
    assert len(remaining.expectations) == 1


def test_history_is_of_runs_here_and_of_the_folder_that_is_resumed(tmp_path):
    here = {"host": host.facts()}
    a_run(tmp_path / "runs" / "one", took(10.0), took(3.0, method="lora", host="elsewhere"), environment=here)
    a_run(tmp_path / "runs" / "of-another-processor", took(5.0))
    a_run(tmp_path / "out", took(7.0, method="parallel"), environment=here)

    found = history(tmp_path / "out", runs=tmp_path / "runs")

    assert sorted(entry.wall_s for entry in found) == [7.0, 10.0]


def test_a_damaged_run_is_said_and_left_out(tmp_path):
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "suite.yaml").write_text("{")
    notes = []

    assert history(runs=tmp_path / "runs", tell=notes.append) == []
    assert len(notes) == 1
    assert notes[0].startswith("the times in ")
