"""A disk that cannot be written ends the run in one line; no cell is recorded because of it, and --resume runs it."""

import errno
import os
import resource
import subprocess

import faulty
import pytest

from builders import a_record
from meftbench.errors import INVALID, UserError
from meftbench.records import writer as writing_records
from meftbench.records.store import RECORDS, load_run, read_records
from meftbench.records.writer import writing
from meftbench.runner import Started
from stand_in import BRIEF, BROKEN, FINE, SILENT
from sweeps import WORKER, a_suite, does, statuses, sweep

FAULTY = (*WORKER[:-1], "faulty")


def files_below(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


RUN_FILES = {".lock", RECORDS, "suite.yaml", "environment.json"}


def resumed(suite, folder, kept):
    """The run, resumed after the disk was mended: all cells ended, and those of `kept` were not run again."""
    run = sweep(suite, folder, resume=True)
    assert kept == run.records[: len(kept)]
    assert len(suite.cells) == len(read_records(folder / RECORDS)[0])
    return run


@pytest.mark.parametrize("behaviour", [FINE, SILENT, BROKEN], ids=["fine", "without-result", "broken"])
def test_a_disk_that_is_full_when_a_cell_ends(small_disk, behaviour):
    """It is named, with what to do; the cell has no record; nothing half-written is left on the disk."""
    disk = small_disk(512)
    suite = a_suite(*does(FINE, behaviour, FINE))

    def fill(event):
        if isinstance(event, Started) and event.done == 1:
            faulty.fill(disk)

    with pytest.raises(UserError) as raised:
        sweep(suite, disk / "run", on_event=fill)

    assert INVALID == raised.value.exit_code
    assert "No space left on device" in str(raised.value)
    assert str(raised.value).startswith(f"{disk / 'run'}")
    assert "make room on that disk, then run it again with --resume" in str(raised.value)
    kept = load_run(disk / "run").records
    assert ["ok"] == [record.status for record in kept]
    left = {name for name in files_below(disk / "run") if not name.endswith(".log")}
    assert left == RUN_FILES
    (disk / "filler").unlink()
    assert ["ok", "ok" if behaviour == FINE else "error", "ok"] == statuses(resumed(suite, disk / "run", kept))


def test_a_disk_that_a_cell_fills_itself(small_disk, monkeypatch):
    monkeypatch.setenv(faulty.FILLED, str(disk := small_disk(512)))
    suite = a_suite(*does(FINE, faulty.FILLING, FINE))

    with pytest.raises(UserError, match="No space left on device"):
        sweep(suite, disk / "run", command=FAULTY)

    (disk / "filler").unlink()
    assert ["ok"] * 3 == statuses(resumed(suite, disk / "run", load_run(disk / "run").records))


@pytest.mark.parametrize("kib", [4, 12])
def test_a_disk_that_becomes_full_at_any_moment(small_disk, kib):
    """By what the run writes, two cells at a time: each time room is made, the run goes on where it ended."""
    disk = small_disk(kib)
    suite, refusals = a_suite(*does(*[BRIEF] * 8)), []

    def went_on():
        try:
            return sweep(suite, disk / "run", resume=True, jobs=2)
        except UserError as error:
            refusals.append(str(error))
            return None

    while (run := went_on()) is None:
        temporary = {name for name in files_below(disk) if name.rpartition("/")[2].startswith(".")}
        assert temporary <= {"run/.lock"}
        kib += 4
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)

    assert refusals
    assert all("No space left on device" in refusal for refusal in refusals)
    assert ["ok"] * 8 == statuses(run)
    assert 8 == len(read_records(disk / "run" / RECORDS)[0])


def test_a_disk_that_is_full_before_the_run_begins(small_disk):
    """One line, and no folder of a run that never began."""
    disk = small_disk(64)
    faulty.fill(disk)

    with pytest.raises(UserError, match="No space left on device"):
        sweep(a_suite(), disk / "run")

    assert {"filler"} == files_below(disk)


def test_a_folder_on_a_read_only_disk_is_one_line(small_disk):
    disk = small_disk(512)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    with pytest.raises(UserError, match="Read-only file system"):
        sweep(a_suite(), disk / "run")


NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EFBIG]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path, monkeypatch, number, call):
    """Half of it is not left either; the error names the file, the reason of the system and what to do."""

    def fails(descriptor, content=b""):
        if content:
            real_write(descriptor, content[: len(content) // 2])
        raise OSError(number, os.strerror(number))

    real_write = os.write
    with writing(tmp_path / "run") as writer:
        writer.append(a_record())
        before = (tmp_path / "run" / RECORDS).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(writing_records.os, call, fails)
            with pytest.raises(UserError) as raised:
                writer.append(a_record(batch_size=2))
        assert before == (tmp_path / "run" / RECORDS).read_bytes()
        writer.append(a_record(batch_size=3))

    assert [8, 3] == [record.cell["batch_size"] for record in read_records(tmp_path / "run" / RECORDS)[0]]
    assert f"{RECORDS}: cannot be written ({os.strerror(number)}); " in str(raised.value)
    assert "--resume" in raised.value.cure


def test_a_file_that_may_not_grow_further(tmp_path):
    """By a real limit: the record that does not fit is no record, the others are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = []

    def append_without_end(writer):
        while True:
            writer.append(record := a_record(batch_size=len(written) + 1))
            written.append(record)

    with writing(tmp_path / "run") as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
        try:
            with pytest.raises(UserError, match="File too large"):
                append_without_end(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert (written, False) == read_records(tmp_path / "run" / RECORDS)
    assert len(written) > 2


@pytest.mark.parametrize("behaviour", [faulty.DISK_OF_OTHERS, faulty.FULL_ELSEWHERE], ids=["unreadable", "full"])
def test_a_file_or_a_disk_that_is_not_of_the_run_is_an_error_of_the_cell(tmp_path, behaviour):
    """Shared memory that is too small for one cell must not keep the others from running."""
    run = sweep(a_suite(*does(behaviour, FINE)), tmp_path / "run", command=FAULTY)

    assert ["error", "ok"] == statuses(run)


def test_the_command_says_it_in_one_line_with_exit_2(small_disk, tmp_path, monkeypatch, cli):
    from meftbench.runner import process

    disk = small_disk(512)
    monkeypatch.setattr(process, "WORKER", FAULTY)
    monkeypatch.setenv(faulty.FILLED, str(disk))
    monkeypatch.chdir(tmp_path)
    grid = f"{{model: bert-base@random, method: full, batch_size: [1, 2], sequence_length: 16, seed: {faulty.FILLING}}}"
    (tmp_path / "toy.yaml").write_text(f"schema: 1\nname: toy\ngrid: {grid}\n")

    code, _, said = cli("run", "toy.yaml", "--out", disk / "run", "--quiet")

    assert INVALID == code, said
    [line] = [line for line in said.splitlines() if line.startswith("meftbench: ")]
    assert "No space left on device" in line
    assert "--resume" in line
