"""kill -9 of the runner, its worker or a cell at random moments: nothing lost, repeated, torn or left.

By the campaign that is printed in reports/kills, with fewer kills.
"""

import os
import subprocess

import psutil
import pytest

from builders import a_measured_cell, a_record, a_run
from campaigns import campaign
from long_profile import many_minutes
from meftbench.errors import DONE, OVER_BUDGET
from meftbench.records.store import RECORDS
from sweeps import wait_until

kills = campaign("kills")
engines = campaign("killed_engines")
COUNTS = [*kills.COUNTS]


@pytest.fixture
def a_kill():
    """A row of the campaign, in which nothing was counted yet."""
    return kills.Kill("local", "stand-in", 1, 0, "runner", 0.1, "-9")


def killed_often(out, seed, times):
    """How often each was killed, in runs of the stand-in of which none was harmed."""
    assert DONE == kills.main([str(out), "--kills", str(times), "--seed", str(seed), "--load", "stand-in"])
    rows = kills.read_kills(out / "kills.csv")
    assert not rows[COUNTS].to_numpy().any(), rows
    return rows.victim.value_counts().to_dict()


def test_kills_at_random_moments(tmp_path, capsys):
    """And the campaign, called again, repeats none of them."""
    counts = killed_often(tmp_path, seed=5, times=6)

    assert {*engines.Local.victims} == {*counts}
    before = (tmp_path / "kills.csv").read_bytes()
    assert counts == killed_often(tmp_path, seed=5, times=6)
    assert before == (tmp_path / "kills.csv").read_bytes()
    assert (tmp_path / "summary.md").read_text() in capsys.readouterr().out


@many_minutes
def test_many_kills_at_random_moments(tmp_path):
    counts = killed_often(tmp_path, seed=2026, times=120)

    assert min(counts[victim] for victim in engines.Local.victims) >= 15, counts


@many_minutes
def test_kills_of_cells_that_measure_a_model(tmp_path):
    assert DONE == kills.main([str(tmp_path), "--kills", "3", "--load", "real"])


# --- that the campaign sees what it is to count ---


def test_a_record_that_is_gone_or_changed_is_lost(tmp_path, a_kill):
    before = [a_record(batch_size=1), a_record(batch_size=2), a_record(batch_size=3)]
    a_run(tmp_path / "run", before[0], a_record("error", batch_size=2))

    kills._count_records(a_kill, tmp_path / "run", before)

    assert (2, 0, 0) == (a_kill.lost, a_kill.repeated, a_kill.torn)


def test_a_second_record_of_a_cell_is_repeated_and_half_a_line_is_torn(tmp_path, a_kill):
    a_run(tmp_path / "run", a_record(), a_record())
    with (tmp_path / "run" / RECORDS).open("a") as stream:
        stream.write('{"schema"')

    kills._count_records(a_kill, tmp_path / "run", [])

    assert (0, 1, 1) == (a_kill.lost, a_kill.repeated, a_kill.torn)


def test_what_a_run_that_has_ended_lacks_or_has_too_much(tmp_path, a_kill, monkeypatch):
    """Cells without a record, temporary files; and a campaign that counts something ends with exit code 1."""
    a_run(tmp_path / "run", a_measured_cell())
    (tmp_path / "run" / ".records.jsonl.abc").touch()

    kills._count_ended(a_kill, tmp_path / "run", kills.LOADS["stand-in"](48), [a_measured_cell()])

    assert (47, 1) == (a_kill.lost, a_kill.torn)
    monkeypatch.setattr(kills, "kills_of_run", lambda *_: [a_kill])
    assert OVER_BUDGET == kills.main([str(tmp_path / "out"), "--kills", "1"])


def test_more_failures_than_kills_and_numbers_of_another_cell_are_surprises(a_kill):
    load = kills.LOADS["stand-in"](3)
    fields = {"model": "bert-base@random", "method": "full", "sequence_length": 16, "seed": 1}
    peak = {"activation_peak_bytes": 1000}
    fine, wrong = (a_record(metrics=peak, batch_size=size, **fields) for size in (1, 2))
    failed = a_record("error", batch_size=3, **fields)
    assert [cell.cell_id for cell in load.suite.cells] == [record.cell_id for record in (fine, wrong, failed)]

    kills._count_wrong(a_kill, load, [fine, failed], costly=1)
    assert 0 == a_kill.surprises
    kills._count_wrong(a_kill, load, [fine, wrong, failed], costly=0)
    assert 2 == a_kill.surprises


def test_a_process_that_is_left_is_counted_and_ended(tmp_path, a_kill, monkeypatch):
    """Whoever its parent is: it is known by its environment."""
    monkeypatch.setattr(kills, "ENDING_SECONDS", 0.0)
    with subprocess.Popen(["sleep", "600"], env={**os.environ, engines.MARK: str(tmp_path)}) as process:
        # Until then it is a copy of this process, or has no environment yet.
        wait_until(lambda: "sleep" in psutil.Process(process.pid).name() and [*engines.marked(str(tmp_path))])
        kills._count_left(a_kill, engines.Local(), tmp_path)

    assert (1, -9) == (a_kill.left, process.returncode)
