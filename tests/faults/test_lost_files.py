"""Files of a run that others remove or replace while it runs: at the end every record is there, and it is said."""

import json
import os
import shutil
from pathlib import Path

import pytest
from faulty import REMOVED, WITHOUT_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_cell, a_record
from meftbench.errors import INVALID, UserError
from meftbench.records.store import RECORDS, load_run, read_records
from meftbench.records.writer import writing
from meftbench.runner import Ended, Noted, Started
from stand_in import BRIEF, FINE
from sweeps import WORKER, a_suite, does, statuses, sweep

FAULTY = (*WORKER[:-1], "faulty")


def remove(file):
    file.unlink()


def empty(file):
    os.truncate(file, 0)


def tear(file):
    os.truncate(file, file.stat().st_size // 2 + 1)


def replace_by_older(file):
    """As a program that synchronises folders does: another file, with an older content."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: content.find(b"\n") + 1])


def add_to(file):
    with file.open("ab") as stream:
        stream.write(b"somebody else's line\n")


def replace_by_link(file):
    target = file.parent / "elsewhere.txt"
    target.write_text("precious")
    file.unlink()
    file.symlink_to(target)


def replace_by_folder(file):
    """With something in it."""
    file.unlink()
    file.mkdir()
    (file / "precious.txt").write_text("precious")


def replace_by_pipe(file):
    file.unlink()
    os.mkfifo(file)


def remove_folder(file):
    shutil.rmtree(file.parent)


def move_folder(file):
    file.parent.rename(file.parent.with_name(f"moved-{len(os.listdir(file.parent.parent))}"))


DAMAGES = [remove, empty, tear, replace_by_older, add_to, replace_by_link, remove_folder, move_folder]
DAMAGES += [replace_by_folder, replace_by_pipe]


@pytest.mark.parametrize("damage", DAMAGES)
def test_records_lost_while_a_run_writes_are_written_again(tmp_path, damage):
    """All are there, in order and once each; what another program wrote is kept beside them; one line says so."""
    suite = a_suite(*does(FINE, FINE, FINE))
    events = []

    def harm(event):
        events.append(event)
        if isinstance(event, Ended) and event.done == 2:
            damage(tmp_path / "run" / RECORDS)

    run = sweep(suite, tmp_path / "run", on_event=harm)

    ended = [event.record for event in events if isinstance(event, Ended)]
    assert (ended, False) == read_records(tmp_path / "run" / RECORDS)
    assert ended == load_run(tmp_path / "run").records == run.records
    [note] = [event.text for event in events if isinstance(event, Noted)]
    assert f"{RECORDS} (3 records)" in note
    assert "written again" in note
    found = tmp_path / "run" / "records-found-1.jsonl"
    assert (damage is add_to) == (found.is_file() and b"somebody else's line\n" in found.read_bytes())
    assert (damage is replace_by_folder) == (found / "precious.txt").is_file()
    assert (damage is replace_by_pipe) == found.is_fifo()
    if damage is replace_by_link:
        assert "precious" == (tmp_path / "run" / "elsewhere.txt").read_text()
    assert ["ok"] * 3 == statuses(sweep(suite, tmp_path / "run", resume=True, command=["false"]))


@pytest.mark.parametrize("damage", [empty, remove_folder])
def test_records_lost_after_the_last_cell_are_written_again(tmp_path, damage):
    """Nothing is appended after it, so what was written is compared with what is there at the end."""

    def harm(event):
        if isinstance(event, Ended) and event.done == event.total:
            damage(tmp_path / "run" / RECORDS)

    run = sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", on_event=harm)

    assert ["ok", "ok"] == statuses(run)


def test_a_byte_that_changed_is_found_at_the_end(tmp_path):
    """The length and the file are the same, and the content is not."""

    def harm(event):
        if isinstance(event, Ended) and event.done == event.total:
            with (tmp_path / "run" / RECORDS).open("r+b") as stream:
                stream.seek(30)
                stream.write(b"\0")

    assert ["ok", "ok"] == statuses(sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", on_event=harm))


@pytest.mark.parametrize("name", ["suite.yaml", "environment.json"])
def test_what_has_the_place_of_another_file_is_set_aside(tmp_path, name):
    folder = tmp_path / "run"

    def harm(event):
        if isinstance(event, Started) and event.done == 1:
            replace_by_folder(folder / name)

    run = sweep(a_suite(*does(FINE, FINE, FINE)), folder, on_event=harm)

    assert ["ok"] * 3 == statuses(run)
    stem, _, suffix = name.partition(".")
    assert "precious" == (folder / f"{stem}-found-1.{suffix}" / "precious.txt").read_text()


def test_a_link_in_the_place_of_the_run_folder_ends_the_run(tmp_path):
    """Nothing is written at its target."""
    (tmp_path / "elsewhere").mkdir()

    def harm(event):
        if isinstance(event, Ended) and event.done == 1:
            (tmp_path / "run").rename(tmp_path / "moved")
            (tmp_path / "run").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UserError, match="run: is a symbolic link"):
        sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", on_event=harm)

    assert [] == os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["suite.yaml", "environment.json", ".lock", "logs"])
def test_other_files_that_were_removed_are_there_again(tmp_path, name):
    """The run can be read and taken up, and no cell is in error."""
    suite, folder = a_suite(*does(FINE, BRIEF, FINE)), tmp_path / "run"

    def harm(event):
        if isinstance(event, Started) and event.done == 1:
            shutil.rmtree(folder / name) if name == "logs" else (folder / name).unlink()

    run = sweep(suite, folder, on_event=harm)

    assert ["ok"] * 3 == statuses(run)
    assert {"suite.yaml", "environment.json", RECORDS, ".lock"} == set(os.listdir(folder))
    assert suite.suite_id == run.suite["suite_id"]


def test_logs_removed_while_a_cell_runs_cost_no_result(tmp_path, monkeypatch):
    monkeypatch.setenv(REMOVED, str(tmp_path / "run" / "logs"))
    run = sweep(a_suite(*does(FINE, WITHOUT_FOLDER, FINE)), tmp_path / "run", command=FAULTY)

    assert ["ok"] * 3 == statuses(run)
    assert "logs" not in os.listdir(run.path)


def test_a_resume_of_a_finished_run_removes_what_a_killed_one_left(tmp_path):
    """Half-written results of cells, though no cell is left to run."""
    run = sweep(a_suite(*does(FINE)), tmp_path / "run")
    (run.path / "logs").mkdir()
    (run.path / "logs" / ".52d0145e-0.json.qxmqm9tb").touch()

    sweep(a_suite(*does(FINE)), tmp_path / "run", resume=True, command=["false"])

    assert "logs" not in os.listdir(run.path)


def test_the_lock_is_taken_again_so_that_no_second_runner_gets_in(tmp_path):
    with writing(tmp_path / "run") as writer:
        (tmp_path / "run" / ".lock").unlink()
        writer.append(a_record())
        with pytest.raises(UserError, match="another run writes here"), writing(tmp_path / "run"):
            pass


def test_a_folder_that_another_run_took_is_not_written_to(tmp_path):
    """The folder was moved away, and another run began at its path."""

    def both_write():
        with writing(tmp_path / "run") as writer:
            writer.write("suite.yaml", "run_id: mine\n")
            writer.append(a_record())
            (tmp_path / "run").rename(tmp_path / "moved")
            with writing(tmp_path / "run") as other:
                other.write("suite.yaml", "run_id: other\n")
                writer.append(a_record(batch_size=2))

    with pytest.raises(UserError, match="another run writes here") as raised:
        both_write()

    assert INVALID == raised.value.exit_code
    assert "run_id: other\n" == (tmp_path / "run" / "suite.yaml").read_text()
    assert ([], False) == read_records(tmp_path / "run" / RECORDS)
    assert 2 == len(read_records(tmp_path / "moved" / RECORDS)[0])


def test_a_folder_in_which_another_run_ended_is_not_written_to(tmp_path):
    def one_after_the_other():
        with writing(tmp_path / "run") as writer:
            writer.write("suite.yaml", "run_id: mine\n")
            (tmp_path / "run").rename(tmp_path / "moved")
            with writing(tmp_path / "run") as other:
                other.write("suite.yaml", "run_id: other\n")
            writer.append(a_record())

    with pytest.raises(UserError, match="was taken by another run"):
        one_after_the_other()

    assert b"" == (tmp_path / "run" / RECORDS).read_bytes()


def test_what_cannot_be_written_again_is_an_error_and_not_exit_0(tmp_path, cli, monkeypatch):
    """A file has the name of the run folder: one line, with the exit code of an unwritable folder."""

    def harm(event):
        if isinstance(event, Ended):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("precious")

    with pytest.raises(UserError, match=r"run(/logs)?: cannot be written") as raised:
        sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", on_event=harm)

    assert INVALID == raised.value.exit_code
    assert "precious" == (tmp_path / "run").read_text()


moments = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(DAMAGES)), max_size=6)


@given(moments)
@settings(max_examples=60)
def test_whatever_happens_to_the_folder_and_when_no_record_is_lost(tmp_path_factory, harms):
    """Damages in any order, between any two records: none lost, none twice, none torn."""
    parent = tmp_path_factory.mktemp("run")
    file = parent / "run" / RECORDS
    written = [a_record(record_id=str(number), batch_size=number) for number in range(1, 7)]
    with writing(parent / "run") as writer:
        writer.write("suite.yaml", "name: toy\nrun_id: r\n")
        writer.write("environment.json", "{}")
        for number, record in enumerate(written, start=1):
            writer.append(record)
            assert (written[:number], False) == read_records(file)
            for moment, damage in harms:
                if moment == number and file.is_file():
                    damage(file)

    assert written == load_run(parent / "run").records


def test_a_resumed_run_restores_what_the_earlier_one_wrote(tmp_path):
    """The writer knows the whole file, not only what it has added."""
    suite = a_suite(*(a_cell(batch_size=size) for size in (1, 2, 3)))
    first = sweep(suite, tmp_path / "run", limit=2)
    suite_file = json.dumps(first.suite, default=str)

    def harm(event):
        if isinstance(event, Started):
            remove_folder(tmp_path / "run" / RECORDS)

    run = sweep(suite, tmp_path / "run", resume=True, on_event=harm)

    assert first.records == run.records[:2]
    assert (3, suite_file) == (len(run.records), json.dumps(run.suite, default=str))


def test_temporary_files_of_a_killed_writer_are_removed(tmp_path):
    """Its own only: a report may be written at the same time."""
    for name in (".records.jsonl.abc_12", ".suite.yaml.x1", ".environment-0af3.json.qq", ".report.html.zz", "notes.md"):
        Path(tmp_path / name).write_text("half")

    with writing(tmp_path):
        pass

    assert {".lock", RECORDS, ".report.html.zz", "notes.md"} == set(os.listdir(tmp_path))
