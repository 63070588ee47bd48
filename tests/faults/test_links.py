"""Nothing is written through a symbolic link in a run folder, whatever name it has."""

import os
from pathlib import Path

import pytest

from builders import a_cell, a_record, a_run
from meftbench.errors import INVALID, UserError
from meftbench.plan.training import Training
from meftbench.records.store import RECORDS, refuse_links
from meftbench.records.writer import writing
from meftbench.runner import Started
from stand_in import FINE
from sweeps import a_suite, does, statuses, sweep


@pytest.fixture
def target(tmp_path):
    file = tmp_path / "precious.txt"
    file.write_text("precious")
    return file


def a_link(link: Path, target: Path) -> None:
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)


@pytest.mark.parametrize("name", [RECORDS, ".lock"])
@pytest.mark.parametrize("is_there", [True, False], ids=["file", "dangling"])
def test_a_run_is_not_written_through_a_link(tmp_path, target, name, is_there):
    """One line, exit 2; the target is as it was, or still absent."""
    if not is_there:
        target.unlink()
    a_link(tmp_path / "run" / name, target)

    with pytest.raises(UserError, match=r"is a symbolic link; remove the link|is not a run folder") as raised:
        sweep(a_suite(), tmp_path / "run", resume=True)

    assert INVALID == raised.value.exit_code
    assert is_there == target.exists()
    assert not is_there or "precious" == target.read_text()


def test_a_finished_run_whose_records_are_a_link_is_read_but_not_appended_to(tmp_path, target):
    run = sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", limit=1)
    moved = (run.path / RECORDS).rename(tmp_path / "elsewhere.jsonl")
    (run.path / RECORDS).symlink_to(moved)
    before = moved.read_bytes()

    with pytest.raises(UserError, match="is a symbolic link"):
        sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", resume=True)

    assert before == moved.read_bytes()


@pytest.mark.parametrize("name", ["logs", "cells"])
def test_a_folder_of_the_run_that_is_a_link_is_refused(tmp_path, name):
    """No cell writes its log, its result or its checkpoints at the target."""
    suite = a_suite(*(a_cell(training=Training(task="rte", learning_rate=rate)) for rate in (1e-3, 1e-4)))
    run = sweep(suite, tmp_path / "run", limit=1)
    (tmp_path / "elsewhere").mkdir()
    a_link(run.path / name, tmp_path / "elsewhere")

    with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
        sweep(suite, tmp_path / "run", resume=True)

    assert [] == os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["a cell", "a cell/best", "a cell/best/adapter_config.json"])
def test_a_link_within_the_folders_of_cells_is_refused(tmp_path, name):
    """No cell writes its checkpoints, or the weights that it keeps, at the target."""
    suite = a_suite(*(a_cell(training=Training(task="rte", learning_rate=rate)) for rate in (1e-3, 1e-4)))
    run = sweep(suite, tmp_path / "run", limit=1)
    (tmp_path / "elsewhere").mkdir()
    link = run.path / "cells" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UserError, match=f"{link.name}: is a symbolic link"):
        sweep(suite, tmp_path / "run", resume=True)

    assert [] == os.listdir(tmp_path / "elsewhere")


def test_no_link_below_a_folder_is_written_through(tmp_path):
    """Neither at the end of a path nor on the way; the folder itself, which the user has named, may be one."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "link").symlink_to(tmp_path)

    refuse_links(tmp_path / "run", tmp_path / "run" / "inner" / "file")
    for path in ("link", "link/file", "link/inner/file"):
        with pytest.raises(UserError, match="link: is a symbolic link"):
            refuse_links(tmp_path / "run", tmp_path / "run" / path)


def test_a_log_that_is_a_link_is_replaced_by_the_log(tmp_path, target):
    """Links put there while the run goes on: the log of a cell and its result are files of their own."""
    suite = a_suite(*does(FINE, FINE))

    def harm(event):
        if isinstance(event, Started):
            for kind in ("log", "json"):
                a_link(tmp_path / "run" / "logs" / f"{event.cell.cell_id}-{event.repeat}.{kind}", target)

    assert ["ok", "ok"] == statuses(sweep(suite, tmp_path / "run", on_event=harm))
    assert "precious" == target.read_text()


def test_the_log_of_the_worker_is_not_written_through_a_link(tmp_path, target):
    sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", limit=1)
    a_link(tmp_path / "run" / "logs" / "worker.log", target)

    with pytest.raises(UserError, match=r"worker\.log: is a symbolic link"):
        sweep(a_suite(*does(FINE, FINE)), tmp_path / "run", resume=True)

    assert "precious" == target.read_text()


@pytest.mark.parametrize("name", ["suite.yaml", "environment.json", "budgets.yaml"])
def test_a_file_that_is_written_whole_takes_the_place_of_a_link(tmp_path, target, name):
    with writing(tmp_path / "run") as writer:
        a_link(tmp_path / "run" / name, target)
        writer.write(name, "new")

    assert "precious" == target.read_text()
    assert not (tmp_path / "run" / name).is_symlink()
    assert "new" == (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize("options", [(), ("--plot", "activation_by_batch")], ids=["page", "plot"])
def test_plots_are_not_written_through_a_link(tmp_path, cli, options):
    run = a_run(tmp_path / "run", a_record(), a_record(batch_size=2))
    (tmp_path / "elsewhere").mkdir()
    a_link(run.path / "plots", tmp_path / "elsewhere")

    code, _, said = cli("report", run.path, *options)

    assert INVALID == code
    assert "plots: is a symbolic link; remove the link" in said
    assert [] == os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["report.html", "table.csv", "table.md"])
def test_a_page_or_table_takes_the_place_of_a_link(tmp_path, target, cli, name):
    run = a_run(tmp_path / "run", a_record())
    a_link(run.path / name, target)

    assert 0 == cli("report", run.path)[0]
    assert "precious" == target.read_text()
    assert (run.path / name).is_file()
    assert not (run.path / name).is_symlink()


def test_a_run_folder_that_is_a_link_itself_was_named_by_the_user(tmp_path):
    """Only links within the folder are refused."""
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large-disk")

    assert ["ok"] == statuses(sweep(a_suite(), tmp_path / "run"))
    assert (tmp_path / "large-disk" / RECORDS).is_file()
