"""How the suite of a run is named, so that it can be run again and says nothing of the machine."""

from __future__ import annotations

import pytest

from meftbench.plan.suite import load_suite
from meftbench.runner.folder import described

SUITE = """schema: 1
name: own
grid: {model: bert-tiny@random, method: full, batch_size: 1, sequence_length: 16}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "here" / "suites").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("suites/own.yaml", "own"),
        ("own.yaml", "own.yaml"),
        ("sweeps/own.yaml", "sweeps/own.yaml"),
        ("../elsewhere/own.yaml", "own.yaml"),
    ],
)
def test_a_suite_is_named_as_it_is_found_where_it_ran(here, place, named):
    """By its name in ./suites, by its path below the folder, and without folders of the machine elsewhere."""
    file = here / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(SUITE)

    assert named == described(load_suite(str(file)))["source"]


def test_a_shipped_suite_has_its_name(here):
    """Wherever its file is."""
    assert "smoke" == described(load_suite("smoke"))["source"]
