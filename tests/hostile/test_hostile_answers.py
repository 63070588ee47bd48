"""What processes of a run answer, mutated: events and results of a worker, answers of other machines. Each is a record
that can be read again, an event, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import ENVIRONMENT, a_cell, a_record
from meftbench.errors import UserError
from meftbench.records.record import Metric, Record
from meftbench.records.store import read_records
from meftbench.records.writer import NoRecordError, writing
from meftbench.runner import node
from meftbench.runner.attempt_records import record_of, record_of_nothing
from meftbench.runner.job import Job, Machine, Outcome
from meftbench.runner.process import parsed_event
from meftbench.runner.result_files import read_result
from meftbench.runner.schedule import Attempt
from mutations import hostile, mutated, refused_or, seen, watched

METRICS = {"activation_peak_bytes": {"value": 7, "unit": "bytes", "source": "counted"}}
RESULT = {
    "status": "oom",
    "status_detail": {"type": "OutOfMemoryError", "message": "no room", "phase": "forward", "requested_bytes": 7},
    "answer": {"metrics": METRICS, "observed": {"attention_used": "sdpa", "label": "mine"}},
}
OUTCOME = {
    **{"status": "ok", "detail": {"type": "x", "retried_after": {"type": "y"}}, "observed": {"attention_used": "sdpa"}},
    **{"pid": 7, "started_at": "2026-11-30T00:00:00.000Z", "finished_at": "2026-11-30T00:00:01.000Z", "wall_s": 1.0},
    **{"lost": False, "metrics": METRICS, "log": "said\n"},
}
MACHINE = Machine("n1", ENVIRONMENT | {"host": {"bf16_products": None, "name": "n1"}})
BEGUN = {"machine": asdict(MACHINE), "slot": {"kinds": ["counted"], "gpu": "", "threads": 1, "memory_bytes": 1000}}
EVENTS = [
    {"event": "started", "id": 1, "pid": 77},
    {"event": "exited", "id": 1, "pid": 77, "code": -9},
    {"event": "ready", "facts": {"torch": "2.13.0"}},
    {"event": "broken", "message": "no torch"},
]
SHARED = {name: f"a {name}" for name in ("run_id", "protocol_id", "environment_id", "meftbench_version", "host")}


@pytest.fixture
def job(tmp_path):
    """One that has ended, with a log."""
    (tmp_path / "logs").mkdir()
    files = {"result": tmp_path / "logs" / "cell.json", "log": tmp_path / "logs" / "cell.log"}
    return Job(a_cell(), 0, None, **files, timeout=1.0, threads=1, memory_bytes=None, environment={})


def is_recorded(folder, outcome):
    """Whatever the outcome holds, its record can be read again, as can those before it."""
    attempt, shared = Attempt(outcome.job.cell, outcome.job.repeat), SHARED | {"code_digest": "d"}
    for file in folder.glob("*"):
        file.unlink()
    with writing(folder) as writer:
        writer.append(a_record())
        try:
            writer.append(record_of(shared, attempt, outcome, {}))
        except NoRecordError as error:
            seen.refused += 1
            writer.append(record_of_nothing(shared, attempt, outcome, str(error)))
    records, torn = read_records(folder / "records.jsonl")
    assert (2, False) == (len(records), torn)
    assert outcome.job.cell.cell_id == records[1].cell_id


@hostile("event of a worker")
@given(content=st.sampled_from(EVENTS).flatmap(lambda event: mutated(event, "json")))
def test_an_event_of_the_worker_is_one_or_none(tmp_path, content):
    with watched(tmp_path):
        event = parsed_event(content)

    seen.refused += event is None
    if event is not None:
        kinds = {"started": ("id", "pid"), "exited": ("id", "code"), "ready": (), "broken": ()}[event["event"]]
        assert all(type(event[name]) is int for name in kinds)
        assert event["event"] != "started" or event["pid"] > 1


@hostile("result of a cell")
@given(content=mutated(RESULT, "json"))
def test_a_result_of_a_cell_is_a_record_or_none(tmp_path, job, content):
    job.result.write_bytes(content)

    with watched(tmp_path):
        result = read_result(job.result)
        if isinstance(result, str):
            seen.refused += 1
            return
        fields = result["status"], result["status_detail"], result["metrics"], result["observed"]
        is_recorded(tmp_path / "run", Outcome(job, *fields, 7, "then", "now", 1.0))


@hostile("answer of a machine")
@given(content=mutated(OUTCOME, "json"))
def test_an_answer_of_a_machine_is_a_record(tmp_path, job, content):
    with watched(tmp_path):
        outcome = refused_or(node.outcome_from, content.decode(errors="replace"), job, MACHINE)
        if not isinstance(outcome, UserError):
            is_recorded(tmp_path / "run", outcome)


@hostile("start on a machine")
@given(content=mutated(BEGUN, "json"))
def test_a_machine_that_begins_is_one_or_refused(tmp_path, content):
    with watched(tmp_path):
        begun = refused_or(node.begun_from, content.decode(errors="replace"), "n1", "n1 cpu 0")

    if not isinstance(begun, UserError):
        machine, slot = begun
        assert machine.environment_id
        assert "n1 cpu 0" == slot.name


NOT_RECORDED = {
    "status": {"status": "banana"},
    "text for seconds": {"wall_s": "x"},
    "no number of seconds": {"wall_s": float("nan")},
    "text for bytes": {"detail": {"requested_bytes": "x"}},
    "long": {"detail": {"message": "x" * 2**24}},
    "infinite": {"detail": {"seconds": 1e999}},
    "no JSON": {"detail": {"circle": object()}},
    "label": {"observed": {"label": 5}},
    "metric": {"metrics": {"no_such_metric": Metric(1, "counted")}},
}


@pytest.mark.parametrize("changes", NOT_RECORDED.values(), ids=NOT_RECORDED)
def test_what_no_record_can_hold_is_an_error_of_its_cell(tmp_path, job, changes):
    """The records before it, and those after it, are read as ever."""
    fields = {"status": "ok", "detail": {}, "metrics": {}, "observed": {}, "pid": 7, "wall_s": 1.0}
    outcome = Outcome(job, **fields | {"started_at": "then", "finished_at": "now"} | changes)

    is_recorded(tmp_path / "run", outcome)

    [_, record], _ = read_records(tmp_path / "run" / "records.jsonl")
    assert isinstance(record, Record)
    assert ("error", "NoResult") == (record.status, record.status_detail["type"])
    assert record.status_detail["message"].startswith("what the process left is no result: ")
    assert len(json.dumps(record.status_detail)) < 1000
