"""How long a run takes is told from what cells took on this machine, as a range that says what it is from."""

from __future__ import annotations

import os
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
    Known,
    Remaining,
    duration,
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
    return Known(pasts(records, PROTOCOL.model_dump(mode="json"), HERE))


def took(wall_s, passes_s=None, parameters=100, status="ok", **fields):
    metrics = {"parameters_total": counted(parameters)}
    metrics |= {} if passes_s is None else {"passes_s": measured(passes_s)}
    return a_record(status, metrics=metrics, wall_s=wall_s, **({"host": HERE} | fields))


def test_the_same_cell_takes_what_it_took():
    found = past(took(10.0), took(14.0, seed=1), took(99.0, method="lora")).expected(a_cell(seed=3), PROTOCOL)

    assert found == Expected(12.0, is_same=True)


def test_another_shape_is_scaled_by_its_tokens_without_what_does_not_grow():
    """Of 10 s, 2 s are for starting and building; the rest grows with twice the tokens."""
    found = past(took(10.0, passes_s=8.0)).expected(a_cell(batch_size=16), PROTOCOL)

    assert found == Expected(18.0, is_same=False)


def test_more_steps_take_longer():
    found = past(took(10.0, passes_s=8.0)).expected(a_cell(), PROTOCOL.model_copy(update={"warmup": 2, "steps": 12}))

    assert found is not None
    assert found.seconds == pytest.approx(2 + 8 * 14 / 7)


def test_another_model_is_scaled_by_its_parameters():
    cell = a_cell(model="bert-large@random")
    parameters = parameters_of(cell)
    found = past(took(10.0, passes_s=8.0, parameters=parameters / 3)).expected(cell, PROTOCOL)

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

    assert past(took(10.0, status=status, **other)).expected(a_cell(), PROTOCOL) is None


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
    nothing = duration([a_cell()], PROTOCOL, Known([]))
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
    assert remaining.attempts == 1


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


def test_times_are_scaled_from_the_shapes_that_are_nearest():
    """Of many shapes, those far off do not count: what a kernel takes for a token depends on how many there are."""
    near = [took(10.0, passes_s=10.0, batch_size=1000 + n) for n in range(100)]
    far = [took(1.0, passes_s=1.0, batch_size=1 + n % 8) for n in range(300)]
    found = past(*far, *near).expected(a_cell(batch_size=1100), PROTOCOL)

    assert found is not None
    assert found.seconds == pytest.approx(10.0 * 1100 / 1049.5, rel=0.01)


def test_of_many_records_no_more_are_read_than_take_a_second(tmp_path, monkeypatch):
    """The newest runs first, and always the run that is resumed."""
    here = {"host": host.facts()}
    for number, name in enumerate(["runs/oldest", "runs/newest", "out"]):
        run = a_run(tmp_path / name, took(10.0 + number), environment=here)
        os.utime(run.path / "suite.yaml", (1000 + number % 2, 1000 + number % 2))
    monkeypatch.setattr("meftbench.runner.duration.MOST_BYTES", (run.path / "records.jsonl").stat().st_size)

    assert [11.0] == [entry.wall_s for entry in history(runs=tmp_path / "runs")]
    assert {11.0, 12.0} == {entry.wall_s for entry in history(tmp_path / "out", runs=tmp_path / "runs")}


@given(st.lists(st.tuples(st.floats(0.1, 1e3), st.one_of(st.none(), st.floats(0.1, 1e3))), min_size=1, max_size=8))
def test_what_is_left_is_the_same_as_if_all_that_is_left_were_gone_through(cells):
    """After each cell: what was expected of the others times by how much those that ended took longer, and the mean of
    what they took for those of which nothing is known."""
    records = [took(wall_s, repeat=number) for number, (wall_s, _) in enumerate(cells)]
    entries = [None if seconds is None else Expected(seconds, is_same=True) for _, seconds in cells]
    remaining = Remaining({(r.cell_id, r.repeat): entry for r, entry in zip(records, entries, strict=True)})

    for number, record in enumerate(records, start=1):
        remaining.ended(record)
        ended = [(r.wall_s, e) for r, e in zip(records[:number], entries[:number], strict=True)]
        told = [(wall_s, e.seconds) for wall_s, e in ended if e is not None]
        factor = sum(wall_s for wall_s, _ in told) / sum(seconds for _, seconds in told) if told else 1.0
        mean = sum(wall_s for wall_s, _ in ended) / number
        left = sum(mean if e is None else e.seconds * factor for e in entries[number:])

        assert remaining.seconds() == pytest.approx(left, abs=1e-6)
