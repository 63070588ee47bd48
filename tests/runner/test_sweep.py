"""The sweep: every cell a record, whatever happens to it, and the run folder right at every moment."""

import json
import math
import multiprocessing
import os
import signal
import threading
from dataclasses import replace

import pytest
import yaml
from fake_nvml import FakeNvml

import stand_in
from builders import a_cell
from meftbench.errors import UserError
from meftbench.records.store import RECORDS, load_run, read_records
from meftbench.records.writer import writing
from meftbench.runner import Ended, Noted, Planned, Started, host, run_suite
from meftbench.runner import sweep as sweeping
from meftbench.verdicts.environment import machine, machines
from stand_in import BRIEF, BROKEN, CRASHED, ENDLESS, FINE, INFINITE, KILLED, OUT_OF_MEMORY
from sweeps import WORKER, a_suite, alive, does, statuses, sweep, told, wait_until


def test_failed_cells_are_results_and_the_cells_after_them_run(tmp_path):
    """Out of memory, a bug, a crash and a kill are each a record; the sweep goes on."""
    run = sweep(a_suite(*does(FINE, OUT_OF_MEMORY, BROKEN, CRASHED, KILLED, FINE)), tmp_path / "run")

    assert ["ok", "oom", "error", "error", "error", "ok"] == statuses(run)
    assert 4096 == run.records[1].status_detail["requested_bytes"]
    assert (11, 9) == (run.records[3].status_detail["exit_signal"], run.records[4].status_detail["exit_signal"])


def test_a_timeout_is_a_result(tmp_path):
    run = sweep(a_suite(*does(ENDLESS, FINE), timeout=0.3), tmp_path / "run")

    assert ["timeout", "ok"] == statuses(run)


def test_a_record_says_what_was_run_and_with_what(tmp_path):
    """Identity, environment, threads and what was observed stand in every record."""
    suite = a_suite(a_cell(batch_size=4), threads=1)

    run = sweep(suite, tmp_path / "run")

    [record] = run.records
    assert (suite.cells[0].cell_id, 0) == (record.cell_id, record.repeat)
    assert suite.protocol.protocol_id == record.protocol_id
    assert run.run_id == record.run_id
    assert run.environment["environment_id"] == record.environment_id
    assert {"label": suite.cells[0].label, "attention_used": "sdpa", "threads": 1}.items() <= record.cell.items()
    assert 4000 == record.value("activation_peak_bytes")
    assert record.started_at < record.finished_at
    assert record.wall_s > 0


def test_the_folder_holds_the_suite_in_full(tmp_path):
    """suite.yaml says what was run and how, without the file it came from; the budgets come along."""
    budgets = tmp_path / "b.yaml"
    budgets.write_text("schema: 1\nbudgets: []\n")
    cells = a_cell(method="lora+checkpoint"), a_cell(batch_size=2)
    suite = a_suite(*cells, warmup=3)

    run = sweep(type(suite)(suite.name, "why", suite.protocol, cells, budgets), tmp_path / "run")

    written = yaml.safe_load((run.path / "suite.yaml").read_text())
    assert [cell.cell_id for cell in cells] == [cell["cell_id"] for cell in written["cells"]]
    assert [True, False] == [cell["levers"]["checkpoint"] for cell in written["cells"]]
    assert (3, "why", suite.suite_id) == (written["protocol"]["warmup"], written["description"], written["suite_id"])
    assert str(budgets) == written["budgets"]
    assert budgets.read_text() == (run.path / "budgets.yaml").read_text()
    assert "logs" not in os.listdir(run.path)


def test_repeats_are_fresh_processes(tmp_path, told_file):
    run = sweep(a_suite(repeats=3), tmp_path / "run")

    assert [0, 1, 2] == [record.repeat for record in run.records]
    assert 3 == len({pid for _, pid in told(told_file)})
    assert {str(record.worker_pid) for record in run.records} == {pid for _, pid in told(told_file)}


def test_cells_that_need_more_than_one_out_of_memory_are_skipped(tmp_path):
    """A skipped cell is a record that names the cell because of which it was not run."""
    cells = [a_cell(batch_size=size, seed=OUT_OF_MEMORY) for size in (1, 2)]

    run = sweep(a_suite(*cells, on_oom="skip-larger"), tmp_path / "run")

    assert ["oom", "skipped"] == statuses(run)
    assert cells[0].cell_id == run.records[1].status_detail["dominated_by"]


def test_an_infinite_metric_survives_the_way_through_the_worker_and_the_file(tmp_path):
    run = sweep(a_suite(*does(INFINITE)), tmp_path / "run")

    assert math.inf == run.records[0].value("starting_point_shift")
    assert '"value": "Infinity"' in (run.path / RECORDS).read_text()


def test_events_tell_of_every_start_and_end(tmp_path):
    events = []

    sweep(a_suite(*does(FINE, BROKEN)), tmp_path / "run", on_event=events.append)

    assert [Planned, Started, Ended, Started, Ended] == [type(event) for event in events]
    assert [(0, 2), (1, 2), (1, 2), (2, 2)] == [(event.done, event.total) for event in events[1:]]
    assert [FINE, BROKEN] == [attempt.cell.seed for attempt in events[0].attempts]


# --- choosing ---


def test_where_and_limit_choose_cells_and_resume_runs_the_rest(tmp_path):
    """The folder belongs to the whole suite, whatever part of it was run first."""
    suite = a_suite(*(a_cell(batch_size=size) for size in (1, 2, 3, 4)))

    first = sweep(suite, tmp_path / "run", where=lambda cell: cell.batch_size > 1, limit=2)
    assert [2, 3] == [record.cell["batch_size"] for record in first.records]
    second = sweep(suite, tmp_path / "run", resume=True, limit=1)
    assert [2, 3, 1] == [record.cell["batch_size"] for record in second.records]
    assert 4 == len(sweep(suite, tmp_path / "run", resume=True).records)


def test_where_that_matches_nothing_writes_nothing(tmp_path):
    with pytest.raises(UserError) as raised:
        sweep(a_suite(), tmp_path / "run", where=lambda cell: False)

    assert 5 == raised.value.exit_code
    assert not (tmp_path / "run").exists()


def test_fail_fast_starts_nothing_after_the_first_failure(tmp_path):
    """Out of memory is a result; an error is a failure."""
    run = sweep(a_suite(*does(OUT_OF_MEMORY, BROKEN, FINE)), tmp_path / "run", fail_fast=True)

    assert ["oom", "error"] == statuses(run)


def test_jobs_run_side_by_side(tmp_path):
    """With two jobs, a cell that never ends leaves room for the others; the cores are divided."""
    run = sweep(a_suite(*does(ENDLESS, FINE, FINE), timeout=1.0), tmp_path / "run", jobs=2)

    assert ["ok", "ok", "timeout"] == statuses(run)
    assert {max(1, host.cores() // 2)} == {record.cell["threads"] for record in run.records}


# --- resuming ---


def test_resume_repeats_nothing_that_has_ended(tmp_path, told_file):
    """Neither ok, oom nor skipped, nor, unless asked for, error."""
    suite = a_suite(*does(FINE, OUT_OF_MEMORY, BROKEN))
    first = sweep(suite, tmp_path / "run")

    second = sweep(suite, tmp_path / "run", resume=True)

    assert [r.record_id for r in first.records] == [r.record_id for r in second.records]
    assert 3 == len(told(told_file))


def test_a_finished_run_is_resumed_without_starting_a_worker(tmp_path):
    suite = a_suite()
    sweep(suite, tmp_path / "run")

    assert ["ok"] == statuses(sweep(suite, tmp_path / "run", resume=True, command=["false"]))


def test_retry_tries_the_named_statuses_again_and_only_the_last_record_counts(tmp_path, told_file):
    suite = a_suite(*does(FINE, OUT_OF_MEMORY, BROKEN))
    first = sweep(suite, tmp_path / "run")

    second = sweep(suite, tmp_path / "run", retry=frozenset({"error"}))

    assert ["ok", "oom", "error"] == statuses(second)
    assert [True, True, False] == [
        a.record_id == b.record_id for a, b in zip(first.records, second.records, strict=True)
    ]
    assert 4 == len(told(told_file)) == len(read_records(second.path / RECORDS)[0])


def test_resume_in_an_empty_folder_begins(tmp_path):
    assert ["ok"] == statuses(sweep(a_suite(), tmp_path / "new", resume=True))


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    sweep(a_suite(), tmp_path / "run")
    before = (tmp_path / "run" / RECORDS).read_bytes()

    with pytest.raises(UserError, match="is not empty; add --resume"):
        sweep(a_suite(), tmp_path / "run")

    assert before == (tmp_path / "run" / RECORDS).read_bytes()


def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")

    for resume in (False, True):
        with pytest.raises(UserError, match="is not"):
            sweep(a_suite(), tmp_path, resume=resume)

    assert ["thesis.tex"] == os.listdir(tmp_path)


def test_a_run_killed_before_its_first_cell_is_begun_anew(tmp_path):
    """All that such a run leaves are the lock, empty records, and perhaps an environment."""
    with writing(tmp_path / "run"):
        (tmp_path / "run" / "environment.json").write_text("{}")
        (tmp_path / "run" / ".suite.yaml.x1").write_text("schema: 1")

    assert ["ok"] == statuses(sweep(a_suite(), tmp_path / "run"))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (a_suite(warmup=5), "holds a run of another protocol (warmup was 2, is 5)"),
        (
            a_suite(a_cell(batch_size=9)),
            "holds a run of another suite (bert-base@random/full/b8/s128 is not in this one)",
        ),
    ],
    ids=["protocol", "others"],
)
def test_another_suite_or_protocol_is_not_mixed_in(tmp_path, other, difference):
    """The error names the first difference; nothing is written."""
    sweep(a_suite(), tmp_path / "run")
    before = (tmp_path / "run" / RECORDS).read_bytes()

    with pytest.raises(UserError) as raised:
        sweep(other, tmp_path / "run", resume=True)

    assert difference in str(raised.value)
    assert 4 == raised.value.exit_code
    assert before == (tmp_path / "run" / RECORDS).read_bytes()


def test_a_suite_that_got_more_cells_is_taken_up(tmp_path):
    """What is there stands; suite.yaml lists the new cells, under the same run."""
    first = sweep(a_suite(), tmp_path / "run")
    before = (tmp_path / "run" / RECORDS).read_bytes()
    events = []

    run = sweep(a_suite(a_cell(batch_size=9), a_cell()), tmp_path / "run", resume=True, on_event=events.append)

    assert ["ok", "ok"] == statuses(run)
    assert (tmp_path / "run" / RECORDS).read_bytes().startswith(before)
    assert [9, 8] == [cell["batch_size"] for cell in run.suite["cells"]]
    assert {first.run_id} == {run.run_id, *(record.run_id for record in run.records)}
    assert ["the suite has 1 more cell than the run began with"] == [e.text for e in events if isinstance(e, Noted)]
    with pytest.raises(UserError, match=r"b9/s128 is not in this one"):
        sweep(a_suite(), tmp_path / "run", resume=True)


def test_time_allowed_and_repeats_may_change_between_executions(tmp_path):
    """They change how long one waits, not what is measured."""
    sweep(a_suite(), tmp_path / "run")

    assert 2 == len(sweep(a_suite(timeout=5.0, repeats=2), tmp_path / "run", resume=True).records)


def test_resuming_in_another_environment_is_said_and_recorded(tmp_path, monkeypatch):
    """Both environments are kept; each record names its own."""
    suite = a_suite(*does(FINE, FINE))
    sweep(suite, tmp_path / "run", limit=1)
    monkeypatch.setattr(host, "cores", lambda: 77)
    events = []

    run = sweep(suite, tmp_path / "run", resume=True, on_event=events.append)

    [note] = [event.text for event in events if isinstance(event, Noted)]
    assert "cores was" in note
    first, second = (record.environment_id for record in run.records)
    assert first == run.environment["environment_id"] != second
    assert 77 == json.loads((run.path / f"environment-{second}.json").read_text())["host"]["cores"]
    assert "(1 of 2 records: " in machines(run)
    assert machines(run).endswith(", 77 cores)")
    assert machine(run.environment) == machines(replace(run, records=run.records[:1]))


def test_a_run_whose_suite_lists_no_cells_is_not_taken_up(tmp_path):
    """Nothing says what it is of, so nothing may be added to it."""
    sweep(a_suite(), tmp_path / "run")
    file = tmp_path / "run" / "suite.yaml"
    file.write_text("".join(line for line in file.read_text().partition("cells:")[0]))

    with pytest.raises(UserError, match=r"suite\.yaml: lists no cells"):
        sweep(a_suite(), tmp_path / "run", resume=True)


def test_a_torn_last_line_is_left_out_and_its_cell_run_again(tmp_path):
    suite = a_suite(*does(FINE, FINE))
    whole = sweep(suite, tmp_path / "run")
    file = whole.path / RECORDS
    file.write_bytes(file.read_bytes()[:-20])
    assert (1, True) == (len(load_run(whole.path).records), load_run(whole.path).torn)

    run = sweep(suite, tmp_path / "run", resume=True)

    assert (["ok", "ok"], False) == (statuses(run), run.torn)
    assert whole.records[0] == run.records[0]


def test_two_runners_do_not_write_into_one_folder(tmp_path, told_file):
    """The second is told so, and the first is not disturbed."""
    suite = a_suite(*does(ENDLESS))
    first = in_another_process(suite, tmp_path / "run")
    wait_until(lambda: told(told_file))

    with pytest.raises(UserError, match="another run writes here"):
        sweep(suite, tmp_path / "run", resume=True)

    assert first.is_alive()
    first.kill()
    first.join()


# --- devices ---


def test_cuda_without_a_gpu_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="use `--device counted`") as raised:
        sweep(a_suite().on("cuda"), tmp_path / "run", nvml=FakeNvml(refuses=("nvmlInit",)))

    assert 4 == raised.value.exit_code
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_others_use_is_refused_unless_the_protocol_shares(tmp_path):
    """`exclusive` is about measured numbers: somebody else's memory is not ours."""
    busy = FakeNvml("H200", busy=(4321,))

    with pytest.raises(UserError, match="in use by process 4321") as raised:
        sweep(a_suite().on("cuda"), tmp_path / "run", nvml=busy)
    assert 4 == raised.value.exit_code
    run = sweep(a_suite(exclusive=False, repeats=1).on("cuda"), tmp_path / "run", nvml=busy)
    assert ["ok"] == statuses(run)


def test_on_cuda_one_cell_runs_on_each_gpu(tmp_path):
    """Each process sees one device, by its UUID."""
    suite = a_suite(*(a_cell(batch_size=size, seed=BRIEF) for size in range(1, 9)), repeats=1).on("cuda")

    run = sweep(suite, tmp_path / "run", nvml=FakeNvml("A", "B", "C"), gpu_indices=(0, 2))

    assert {"GPU-00", "GPU-22"} == {record.cell["gpu"] for record in run.records}
    assert ["A", "B", "C"] == [device["name"] for device in run.environment["gpus"]["devices"]]


def test_counted_cells_see_no_gpu(tmp_path):
    run = sweep(a_suite(), tmp_path / "run", nvml=FakeNvml("A"))

    assert "" == run.records[0].cell["gpu"]


# --- ends ---


def in_another_process(suite, out, **options):
    """A sweep in a forked process."""
    process = multiprocessing.get_context("fork").Process(
        target=run_suite, args=(suite, out), kwargs={"command": WORKER, "resume": True} | options
    )
    process.start()
    return process


def test_killing_the_sweep_kills_its_cells(tmp_path, told_file):
    """After `kill -9` nothing is left running that would disturb the next measurement."""
    process = in_another_process(a_suite(*does(stand_in.PARENT)), tmp_path / "run")
    wait_until(lambda: told(told_file, "grandchild"))

    process.kill()
    process.join()

    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(told_file)))


def test_an_interrupted_sweep_keeps_what_has_finished(tmp_path, told_file):
    """KeyboardInterrupt leaves run_suite, the running cell dies, finished records stay."""
    suite = a_suite(*does(FINE, ENDLESS, FINE))

    def interrupt(event):
        if isinstance(event, Started) and event.cell.seed == ENDLESS:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    # Not SIGINT, which would end the tests if it came late, nor SIGALRM, which pytest-timeout needs.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(suite, tmp_path / "run", on_event=interrupt)
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert ["ok"] == statuses(load_run(tmp_path / "run"))
    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(told_file)))


@pytest.mark.parametrize(
    ("products", "precision", "passes", "said"),
    [
        (False, "bf16-autocast", ("memory", "throughput"), True),
        (False, "bf16", ("throughput",), True),
        (False, "bf16", ("memory",), False),
        (False, "fp32", ("throughput",), False),
        (True, "bf16", ("throughput",), False),
        (None, "bf16", ("throughput",), False),
    ],
)
def test_a_processor_without_bf16_products_is_said(tmp_path, monkeypatch, products, precision, passes, said):
    """Steps take thirty times as long there; a run that only counts does not mind."""
    monkeypatch.setattr(host, "bf16_products", lambda: products)
    events = []

    sweep(a_suite(a_cell(precision=precision), passes=passes), tmp_path / "run", on_event=events.append)

    assert said == (sweeping.SLOW_IN_BF16 in [event.text for event in events if isinstance(event, Noted)])
