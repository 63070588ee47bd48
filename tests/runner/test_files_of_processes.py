"""Files that processes of a run leave, and what else may have their names: read at once, or not at all."""

import os
from pathlib import Path

import pytest

from meftbench.errors import UserError
from meftbench.records.store import RECORDS
from meftbench.records.writer import writing
from meftbench.runner import logs
from meftbench.runner.result_files import is_of_disk, read_result


def a_folder(path):
    path.mkdir()


def a_circle(path):
    path.symlink_to(path)


def deep(path):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("make", [os.mkfifo, a_folder, a_circle, deep])
def test_a_result_that_is_no_file_of_json_is_said(tmp_path, make):
    make(tmp_path / "cell.json")

    assert str(read_result(tmp_path / "cell.json")).startswith("the process left an unreadable result, ")


def test_no_result_is_said(tmp_path):
    assert "the process left no result" == read_result(tmp_path / "cell.json")


@pytest.mark.parametrize("make", [os.mkfifo, a_folder, a_circle])
def test_a_log_that_is_no_file_is_empty(tmp_path, make):
    make(tmp_path / "cell.log")

    assert "it printed nothing" == logs.end_of(tmp_path / "cell.log")


def test_what_is_no_file_among_the_logs_stays(tmp_path):
    """Somebody else has put it there."""
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.log").mkdir()
    os.mkfifo(tmp_path / "c.log")
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.log").touch()

    logs.tidy(tmp_path)

    assert ["a.json", "b.log", "c.log"] == sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir()])
def test_records_that_are_no_file_are_refused(tmp_path, make):
    """Without waiting for what another program may write into a pipe."""
    make(tmp_path / RECORDS)

    with pytest.raises(UserError, match=r"is not a regular file|cannot be written"), writing(tmp_path):
        pass


def test_a_file_of_the_run_that_is_too_large_is_refused(tmp_path):
    """It takes no memory: on the disk there is nothing of it."""
    with (tmp_path / "environment-ab.json").open("wb") as stream:
        stream.truncate(2**40)

    with pytest.raises(UserError, match=r"environment-ab\.json: has 1,024.0 GiB, and at most"), writing(tmp_path):
        pass


@pytest.mark.parametrize(
    ("said", "is_it"),
    [
        ("PermissionError: Permission denied: '{run}/cells/a'", True),
        ("Permission denied: {run}", True),
        ("{run}: Read-only file system", True),
        ("PermissionError: Permission denied: '{run}_presets/model.safetensors'", False),
        ("Permission denied: '{run}2'", False),
        ("Permission denied: '/elsewhere/model.safetensors'", False),
        ("ValueError: no such key in {run}/cells/a", False),
    ],
)
def test_an_error_of_the_disk_names_a_file_of_the_run(tmp_path, said, is_it):
    """And not a file whose path begins with the same letters."""
    run = Path(tmp_path / "run")

    assert is_it == is_of_disk(said.format(run=run), run)
