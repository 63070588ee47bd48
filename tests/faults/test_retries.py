"""Cells that were skipped because another was out of memory are judged anew when that one is tried again."""

import itertools

import pytest
from faulty import ROOM, UNTIL_ROOM

from builders import a_cell
from meftbench.records.store import RECORDS, read_records
from meftbench.runner import Started
from sweeps import WORKER, a_suite, statuses, sweep

FAULTY = (*WORKER[:-1], "faulty")
SUITE = a_suite(*(a_cell(batch_size=size, seed=UNTIL_ROOM) for size in (1, 2, 3)), on_oom="skip-larger")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A file; from when it is there, no cell is out of memory any more."""
    monkeypatch.setenv(ROOM, str(tmp_path / "room"))
    return tmp_path / "room"


def swept(folder, **options):
    return sweep(SUITE, folder, command=FAULTY, **options)


def test_what_was_skipped_because_of_a_cell_that_is_tried_again_runs_too(tmp_path, room):
    """Where the small cell fits now, nothing says that the larger ones do not."""
    assert ["oom", "skipped", "skipped"] == statuses(swept(tmp_path / "run"))
    room.touch()

    assert ["ok", "ok", "ok"] == statuses(swept(tmp_path / "run", retry=frozenset({"oom"})))


def test_where_it_is_out_of_memory_again_they_are_skipped_again(tmp_path, room):
    swept(tmp_path / "run")

    run = swept(tmp_path / "run", retry=frozenset({"oom"}))

    assert ["oom", "skipped", "skipped"] == statuses(run)
    assert 6 == len(read_records(run.path / RECORDS)[0])


def test_a_retry_that_was_interrupted_is_finished_by_a_resume(tmp_path, room):
    """The record that a cell was skipped stands in the file, but its reason does not hold any more."""
    swept(tmp_path / "run")
    room.touch()
    starts = itertools.count()

    def interrupt(event):
        if isinstance(event, Started) and next(starts) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "run", retry=frozenset({"oom"}), on_event=interrupt)

    assert ["ok", "ok", "ok"] == statuses(swept(tmp_path / "run", resume=True))
    assert ["ok"] * 3 == statuses(swept(tmp_path / "run", resume=True))
    assert 6 == len(read_records(tmp_path / "run" / RECORDS)[0])


def test_a_cell_that_is_not_chosen_keeps_its_status(tmp_path, room):
    """It is not tried again, so that it still says that larger ones do not fit."""
    swept(tmp_path / "run")
    room.touch()

    run = swept(tmp_path / "run", retry=frozenset({"oom"}), where=lambda cell: cell.batch_size > 1)

    assert ["oom", "skipped", "skipped"] == statuses(run)
    assert 3 == len(read_records(run.path / RECORDS)[0])
