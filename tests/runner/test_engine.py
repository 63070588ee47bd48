"""What a sweep asks of an engine, with several machines: each record says where it was made, and none is lost."""

import json
from dataclasses import replace

import pytest
from stand_in_cluster import Cluster, Full, Interrupted

from builders import a_cell
from meftbench.errors import UserError
from meftbench.records.store import load_run
from meftbench.runner import Noted, Planned, folder, run_suite
from meftbench.runner.engine import COUNTED
from meftbench.verdicts.environment import environments
from sweeps import a_suite, statuses, sweep

TWO = {"alpha": [COUNTED], "beta": [COUNTED]}


def cells(number, **fields):
    return [a_cell(batch_size=1 + n, **fields) for n in range(number)]


def run_on(cluster, suite, folder, **options):
    events = []
    run = run_suite(suite, folder, engine=cluster, on_event=events.append, **options)
    return run, events


def notes(events):
    return [event.text for event in events if isinstance(event, Noted)]


def test_each_record_has_the_environment_and_host_of_its_machine(tmp_path):
    """And the folder has each environment; never that of the driver."""
    run, events = run_on(Cluster(TWO), a_suite(*cells(4)), tmp_path / "run")

    hosts = {record.host: record.environment_id for record in run.records}
    assert {"alpha": "e61", "beta": "e62"} == hosts
    assert {"e61", "e62"} == environments(run).keys()
    assert "e61" == run.environment["environment_id"]
    assert "beta" == json.loads((run.path / "environment-e62.json").read_text())["host"]["name"]
    assert 2 == next(event.at_a_time for event in events if isinstance(event, Planned))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_cell_whose_machine_is_lost_is_run_once_more_elsewhere(tmp_path, keeps):
    """It is said, and its record tells of it."""
    cluster = Cluster(TWO, losses={3: 1}, keeps=keeps)
    suite = a_suite(a_cell(seed=3), *cells(3))

    run, events = run_on(cluster, suite, tmp_path / "run")

    assert ["ok"] * 4 == statuses(run)
    [record] = [record for record in run.records if record.cell["seed"] == 3]
    assert {"type": "WorkerDied" if keeps else "NodeLost", "message": "alpha is gone", "host": "alpha"} == (
        record.status_detail["retried_after"]
    )
    assert "beta" == record.host
    assert [f"{suite.cells[0].label}: alpha is gone; it is run again"] == notes(events)
    assert ["alpha0", "beta0"] == [slot for cell_id, slot in cluster.ran if cell_id == suite.cells[0].cell_id]


def test_nothing_that_was_lost_begins_again_after_the_first_failure(tmp_path):
    """Of a run that ends with it; `--resume` runs it."""

    class Failing(Cluster):
        def poll(self):
            outcome = super().poll()
            return replace(outcome, status="error") if outcome and outcome.job.cell.seed == 4 else outcome

    cluster = Failing({"alpha": [COUNTED]}, losses={3: 1}, keeps=True)
    cluster.places |= {replace(slot, name="alpha1"): "alpha" for slot in cluster.places}
    suite = a_suite(a_cell(seed=4), a_cell(seed=3))

    run, events = run_on(cluster, suite, tmp_path / "run", fail_fast=True)

    assert ["error"] == statuses(run)
    assert [f"{suite.cells[1].label}: alpha is gone; `--resume` runs it again"] == notes(events)
    assert ["error", "ok"] == statuses(run_on(Cluster(TWO), suite, tmp_path / "run", resume=True)[0])


def test_a_second_loss_is_recorded(tmp_path):
    suite = a_suite(a_cell(seed=3), *cells(2))

    run, _ = run_on(Cluster({**TWO, "gamma": [COUNTED]}, losses={3: 2}), suite, tmp_path / "run")

    [record] = [record for record in run.records if record.cell["seed"] == 3]
    assert ("error", "NodeLost") == (record.status, record.status_detail["type"])
    assert "NodeLost" == record.status_detail["retried_after"]["type"]
    assert 3 == len(run.records)


def test_a_worker_that_dies_in_the_only_place_is_tried_there_again(tmp_path):
    run, _ = run_on(Cluster({"alpha": [COUNTED]}, losses={3: 1}, keeps=True), a_suite(a_cell(seed=3)), tmp_path / "run")

    assert ["ok"] == statuses(run)


def test_when_no_machine_is_left_the_run_ends_in_one_line_and_is_resumed_elsewhere(tmp_path):
    """On another cluster, or on this machine: nothing is repeated or lost."""
    suite = a_suite(*cells(2), a_cell(seed=3), *cells(2, sequence_length=16))
    with pytest.raises(UserError, match=r"no machine is left that can run 3 of 5 attempts") as raised:
        run_on(cluster := Cluster({"alpha": [COUNTED]}, losses={3: 1}), suite, tmp_path / "run")
    assert 4 == raised.value.exit_code
    assert cluster.closed
    before = load_run(tmp_path / "run").records

    run, events = run_on(Cluster({"beta": [COUNTED]}), suite, tmp_path / "run", resume=True, limit=1)
    assert before == run.records[:2]
    assert ["alpha", "alpha", "beta"] == [record.host for record in run.records]
    assert notes(events)[0].startswith("the run began in another environment")

    run = sweep(suite, tmp_path / "run", resume=True)
    assert 5 == len(run.records) == len({record.cell_id for record in run.records})
    assert 3 == len({record.environment_id for record in run.records})


def test_a_resumed_run_finds_the_machine_that_it_began_on(tmp_path):
    """Whatever the order in which a cluster lists its machines."""
    suite = a_suite(*cells(4))
    run_on(Cluster(TWO), suite, tmp_path / "run", limit=2)

    run, events = run_on(Cluster({"beta": [COUNTED], "alpha": [COUNTED]}), suite, tmp_path / "run", resume=True)

    assert [] == notes(events)
    assert 4 == len(run.records)


@pytest.mark.parametrize(("cluster", "error"), [(Interrupted, KeyboardInterrupt), (Full, UserError)])
def test_an_engine_is_closed_however_the_run_ends(tmp_path, cluster, error):
    with pytest.raises(error):
        run_on(engine := cluster(TWO), a_suite(*cells(2)), tmp_path / "run")

    assert engine.closed
    assert [] == load_run(tmp_path / "run").records


def test_data_that_differ_between_machines_are_refused_before_anything_is_written(tmp_path):
    found = {name: {"key": {"task": "rte", "digest": name}} for name in TWO}

    with pytest.raises(UserError, match="the data of task 'rte' are others on beta than on alpha") as raised:
        run_on(Cluster(TWO, data=found), a_suite(), tmp_path / "run")

    assert 4 == raised.value.exit_code
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_are_said_with_the_machine(tmp_path):
    found = {"alpha": {}, "beta": {"key": {"task": "rte", "error": ["rte", "has no split", "see to it"]}}}

    with pytest.raises(UserError, match=r"^beta: rte: has no split; see to it"):
        run_on(Cluster(TWO, data=found), a_suite(), tmp_path / "run")


def test_own_code_that_differs_between_machines_is_refused(tmp_path, here):
    """The folder is then not begun."""
    suite = a_suite(a_cell(model="mine.models:tiny"))
    code = {"alpha": {"mine.models:tiny": "a"}, "beta": {"mine.models:tiny": "b"}}
    allowed = type(suite)(suite.name, "", suite.protocol, suite.cells, None, allow_code=True)

    with pytest.raises(UserError, match=r"mine\.models:tiny: is another on beta than on alpha"):
        run_on(Cluster(TWO, code=code), allowed, tmp_path / "run")

    assert not (tmp_path / "run").exists()


class Unasked(Cluster):
    """An engine that takes long to find machines, as Ray does."""

    def survey(self, work):
        raise AssertionError("the folder is looked at first")


def test_an_engine_is_not_asked_for_machines_where_the_folder_decides(tmp_path):
    """It is in use for something else, of another suite, or nothing is left to run."""
    suite = a_suite(*cells(2))
    first, _ = run_on(Cluster(TWO), suite, tmp_path / "run")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a.txt").touch()

    again, _ = run_on(Unasked(TWO), suite, tmp_path / "run", resume=True)

    assert [r.record_id for r in first.records] == [r.record_id for r in again.records]
    with pytest.raises(UserError, match="used: is not empty"):
        run_on(Unasked(TWO), suite, tmp_path / "used")
    with pytest.raises(UserError, match="holds a run of another suite"):
        run_on(Unasked(TWO), a_suite(a_cell(batch_size=77)), tmp_path / "run", resume=True)


def test_what_is_left_meanwhile_is_not_run_without_machines(tmp_path, monkeypatch):
    """Another command may retry cells between the first look at the folder and the one under its lock."""
    suite = a_suite(*cells(2))
    run_on(Cluster(TWO), suite, tmp_path / "run")
    looks = iter([folder.earlier_run, lambda *given: None])
    monkeypatch.setattr(folder, "earlier_run", lambda *given: next(looks)(*given))

    with pytest.raises(UserError, match="was changed by another command meanwhile; run this again"):
        run_on(Unasked(TWO), suite, tmp_path / "run", resume=True)
