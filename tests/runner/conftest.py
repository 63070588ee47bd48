import pytest

from sweeps import path_for_workers


@pytest.fixture(autouse=True)
def _workers_find_the_stand_in(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_for_workers())


@pytest.fixture
def told_file(tmp_path, monkeypatch):
    """Where the stand-in tells which cells it has measured, and in which process."""
    file = tmp_path / "told.txt"
    monkeypatch.setenv("STAND_IN_TOLD", str(file))
    return file
